"""Titans' variants and TTT are what their equations say, and their states are of the size said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import assert_close
from seqlab.errors import ConfigError
from seqlab.layers.linear import heads, merge
from seqlab.layers.neural_memory import Config as Memory
from seqlab.layers.norm import unit_length
from seqlab.layers.registry import mixer_config
from seqlab.layers.rope import rope
from seqlab.layers.window_attention import Config as Window
from seqlab.layers.window_attention import WindowAttention
from seqlab.models import lm
from seqlab.models.summary import state_bytes

B, D, H, SEGMENT = 2, 16, 2, 4
T = 2 * SEGMENT + 3


def tokens():
    return jax.random.normal(jax.random.key(0), (B, T, D))


def softmax_over(q, k, v, sees, always):
    """Plain attention [B, T, H, K] of q to k where `sees` [T, S], and to the tokens k, v `always`
    [N, H, K], for which queries and keys are given apart: (q, k, v)."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.where(sees, jnp.einsum("bthk,bshk->bhts", q, k) * scale, -jnp.inf)
    plain, keys, values = always
    fixed = jnp.einsum("bthk,nhk->bhtn", plain, keys) * scale
    weights = jax.nn.softmax(jnp.concatenate([scores, fixed], -1), -1)
    values = jnp.broadcast_to(values, (B, *values.shape))
    return jnp.einsum("bhts,bshk->bthk", weights, jnp.concatenate([v, values], 1))


def test_persistent_tokens_stand_beside_the_window_for_every_query():
    config = Window(heads=H, window=5, persistent=3)
    attention = jax.jit(lambda: WindowAttention(config, D, rngs=nnx.Rngs(0)))()

    @jax.jit
    def actual_and_expected(attention, x):
        y, _ = attention(x, attention.init_state(B), jnp.zeros((B, T), bool))
        q, k, v = (heads(f(x), H) for f in (attention.q, attention.k, attention.v))
        always = attention.persistent.tokens[...]
        keys, values = (heads(f(always), H) for f in (attention.k, attention.v))
        t = np.arange(T)
        turned = lambda a: rope(a, jnp.broadcast_to(t, (B, T)), 10_000.0)
        apart = t[:, None] - t
        sees = (apart >= 0) & (apart < 5)
        return y, merge(softmax_over(turned(q), turned(k), v, sees, (q, keys, values)))

    assert_close(*actual_and_expected(attention, tokens()))


def test_memory_as_a_context_equals_its_equations_segment_by_segment():
    memory = Memory(heads=H, chunk_size=SEGMENT)
    config = mixer_config("titans_mac", heads=H, memory=memory)
    mac = jax.jit(lambda: config.build(D, rngs=nnx.Rngs(0)))()
    x = tokens()
    y, _ = jax.jit(lambda mac, x: mac(x))(mac, x)

    @jax.jit
    def segment(state, x):
        size, attention = x.shape[1], mac.attention
        W = [W[...] + D for W, D in zip(mac.memory.layers, state.memory.weights, strict=True)]
        asked = unit_length(heads(jax.nn.silu(mac.recall(x)), H))
        inner = jax.nn.gelu(jnp.einsum("bthi,bhio->btho", asked, W[0]))
        h = mac.context_norm(merge(jnp.einsum("bthi,bhio->btho", inner, W[1])))
        place = jnp.broadcast_to(jnp.arange(size), (B, size))
        turned = lambda a: rope(heads(a, H), place, 10_000.0)
        k = jnp.concatenate([turned(attention.k(a)) for a in (h, x)], 1)
        v = jnp.concatenate([heads(attention.v(a), H) for a in (h, x)], 1)
        always = attention.persistent.tokens[...]
        fixed = [heads(f(always), H) for f in (attention.k, attention.v)]
        q, sees = attention.q(x), np.tile(np.tri(size, dtype=bool), 2)
        a = merge(softmax_over(turned(q), k, v, sees, (heads(q, H), *fixed)))
        m, state = mac.memory(a, state, jnp.zeros((B, size), bool))
        return mac.out(mac.attention_norm(a) * jax.nn.sigmoid(mac.memory_norm(m))), state

    state, expected = mac.memory.init_state(B), []
    for start in range(0, T, SEGMENT):
        piece, state = segment(state, x[:, start : start + SEGMENT])
        expected.append(piece)
    assert_close(y, jnp.concatenate(expected, 1))


def test_a_state_holds_weights_their_momentum_and_their_start_and_says_so():
    d, hidden, depth = D // H, 2 * D // H, 3
    config = mixer_config("titans_lmm", heads=H, depth=depth, conv_width=4)
    model = lm.Config(vocab=11, d_model=D, pattern=(config,), repeats=2).skeleton()
    network = d * hidden + hidden * hidden + hidden * d
    numbers = 3 * H * network + 3 * (3 * D) + H  # of the network, the convolution, and the phase
    assert state_bytes(model) == 2 * 4 * numbers
    made = jax.jit(lambda: config.build(D, rngs=nnx.Rngs(0)).init_state(1))()
    assert 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(made)) == state_bytes(model)


def test_ttt_keeps_two_copies_of_its_model_for_a_head():
    config, d = mixer_config("ttt", heads=H, conv_width=0), D // H
    state = jax.jit(lambda: config.build(D, rngs=nnx.Rngs(0)).init_state(1))()
    assert sum(a.nbytes for a in jax.tree.leaves(state)) == 4 * H * (2 * d * (d + 1) + 1)


@pytest.mark.parametrize("name", ["titans_lmm", "titans_mac", "titans_mag", "titans_mal", "ttt"])
def test_a_width_that_heads_do_not_divide_is_refused(name):
    with pytest.raises(ConfigError, match="heads"):
        mixer_config(name).build(18, rngs=nnx.Rngs(0))
