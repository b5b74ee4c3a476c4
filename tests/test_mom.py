"""Mixture-of-Memories: sorted tokens give what masks give, and training hears of the router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.kernels.slots import laid
from seqlab.layers import auxiliary
from seqlab.layers.linear import heads
from seqlab.layers.mixers import mom
from seqlab.layers.registry import mixer_config
from seqlab.models import lm
from seqlab.models.parameters import decays, parameters
from seqlab.models.summary import state_bytes
from seqlab.parallel.mesh import use_mesh
from seqlab.train import step
from seqlab.train.config import Optimizer
from seqlab.train.corpus import Batch

B, T, D = 2, 24, 12


def built(**fields) -> mom.MoM:
    """Its router reads the first channels of a token, so that tests choose who goes where."""
    config = mom.Config(**{"key_dim": 4, "value_dim": 6, "chunk_size": 16} | fields)
    mixer = jax.jit(lambda: config.build(D, rngs=nnx.Rngs(0)))()
    mixer.router.weight[...] = jnp.eye(D, config.memories)
    return mixer


def tokens(scores, rng, length=T):
    """x [B, length, D] whose router scores are `scores` [B, length, M]."""
    x = rng.normal(size=(B, length, D)).astype(np.float32)
    x[..., : scores.shape[-1]] = scores
    return x


def oracle(mixer: mom.MoM, x, reset):
    """Every memory runs over all tokens, masked where a token did not choose it; no state before.

    Taps read the last tokens of their own memory and document, found by their rank in it.
    """
    c, k = mixer.config, mixer.config.top_k
    scores = jax.nn.softmax(x @ mixer.router.weight[...])
    share = jnp.where(scores >= jnp.sort(scores, -1)[..., -k, None], scores, 0)
    share = share / jnp.sum(share, -1, keepdims=True)
    share = jnp.concatenate([share, jnp.ones_like(share[..., :1])], -1)  # the shared memory
    document = jnp.cumsum(reset, 1)
    each = lambda params: [w[...] for w in params]

    def read(m):
        mine, own = share[..., m] > 0, lambda w: x @ w[m]
        maps = [x @ mixer.q.weight[...], own(mixer.k[...]), own(mixer.v[...])]
        qkv = jnp.concatenate(maps, -1)
        at = jax.vmap(lambda a: jnp.nonzero(a, size=T, fill_value=0)[0])(mine)
        count, convolved = jnp.cumsum(mine, 1), 0
        for lag in range(c.conv_width):
            earlier = jnp.take_along_axis(at, jnp.maximum(count - 1 - lag, 0), 1)
            there = jnp.take_along_axis(document, earlier, 1) == document
            seen = (there & (count > lag))[..., None]
            past = jnp.take_along_axis(qkv, earlier[..., None], 1)
            convolved += mixer.conv.weight[...][-1 - lag] * jnp.where(seen, past, 0)
        parts = jnp.split(convolved, [mixer.d_k, 2 * mixer.d_k], -1)
        qkv = jnp.concatenate([heads(part, c.heads) for part in parts], -1)
        gates = mixer.base.gates(lambda x, w: x @ w[m], x, *each(mixer.base.projections))
        given = mixer.base.tokens(qkv, gates, *each(mixer.base.weights))
        mask = lambda a: jnp.where(mine.reshape(*mine.shape, *(1,) * (a.ndim - 2)), a, 0)
        given = (given[0], *map(mask, given[1:]))
        memory = jnp.zeros((B, c.heads, c.key_dim, c.value_dim), widen(x).dtype)
        y, _ = mixer.base.recurrence(*given, reset, memory, implementation="reference")
        return share[..., m, None, None] * y

    total = jnp.sum(jax.lax.map(read, jnp.arange(c.memories + 1)), 0)
    gate = jax.nn.silu(mixer.gate(x))
    return mixer.out(mixer.norm(total).reshape(*x.shape[:2], -1) * gate)


@pytest.mark.parametrize("base", ["gated_delta", "gated_linear", "ssd", "linear"])
def test_sorted_tokens_give_what_masks_give_in_float64(base):
    """y and all gradients, for balanced routing, all to one memory, and memories without tokens."""
    rng = np.random.default_rng(0)
    mixer = built(base=base)
    scores = rng.normal(size=(B, T, 4))
    one = np.where(np.arange(4) < 2, 9.0, 0) + 0.1 * rng.normal(size=(B, T, 4))
    turn = np.repeat(np.eye(4)[::-1], T // 4, 0) * 5 + 0.1 * rng.normal(size=(B, T, 4))
    reset = np.zeros((B, T), bool)
    reset[0, [0, 5, 6, 17]] = True

    def both(run):
        def loss(mixer, x, reset):
            y = run(mixer, x, reset)
            return jnp.sum(jnp.sin(y) + y * jnp.cos(jnp.arange(D))), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(np.asarray(a), jnp.float64)
        mixer, state = jax.tree.map(wide, (mixer, mixer.init_state(B)))
        ours, masked = both(lambda m, x, r: m(x, state, reset=r)[0]), both(oracle)
        for case in (scores, one, turn):
            x = wide(tokens(case, rng))
            actual, expected = ours(mixer, x, reset), masked(mixer, x, reset)
            assert_close(actual[1], expected[1])
            assert_close(actual[0], expected[0], GRADIENT)


def test_a_memory_sees_its_own_tokens_alone():
    """What a memory's tokens give among others is what they give alone: nothing leaks through the
    convolution, in whatever order memories are sorted."""
    rng = np.random.default_rng(1)
    mixer = built(memories=3, top_k=1, shared_memory=False)
    owner = np.arange(T) % 3
    x = tokens(np.broadcast_to(9 * np.eye(3)[owner], (B, T, 3)), rng)
    run = jax.jit(lambda x: mixer(x)[0])
    together = run(x)
    for m in range(3):
        assert_close(together[:, owner == m], run(x[:, owner == m]))


def test_one_token_touches_the_memories_it_chose_alone():
    rng = np.random.default_rng(2)
    mixer = built(memories=5, top_k=2)
    scores = np.where(np.isin(np.arange(5), (1, 3)), 9.0, 0) * np.ones((B, 1, 5))
    before = jax.jit(mixer.__call__)(tokens(np.zeros((B, T, 5)), rng))[1]
    chosen = np.isin(np.arange(6), (1, 3, 5))  # the last is shared
    spoilt = jax.tree.map(
        lambda a: jnp.where(chosen.reshape(6, *(1,) * (a.ndim - 3)), a, jnp.nan), before
    )
    one = jax.jit(lambda x, state: mixer(x, state))
    x = tokens(scores, rng, 1)
    y, after = one(x, spoilt)
    expected, _ = one(x, before)
    np.testing.assert_array_equal(y, expected)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        changed = np.any(np.asarray(old != new), axis=(0, 1, 3, 4))
        np.testing.assert_array_equal(changed, [True] * 6)  # NaN is not itself
        assert np.isfinite(np.asarray(new)[:, :, chosen]).all()
        assert np.isnan(np.asarray(new)[:, :, ~chosen]).all()


def test_one_token_needs_no_copy_of_all_memories():
    def temporary(memories):
        mixer = jax.eval_shape(lambda: mom.Config(memories=memories).build(D, rngs=nnx.Rngs(0)))
        state = jax.eval_shape(
            lambda: mom.Config(memories=memories).build(D, rngs=nnx.Rngs(0)).init_state(B)
        )
        step = jax.jit(lambda mixer, x, state: mixer(x, state), donate_argnums=2)
        one = jax.ShapeDtypeStruct((B, 1, D), jnp.float32)
        return step.lower(mixer, one, state).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(8), temporary(64)
    assert many < few + B * 2 * 16 * 16 * 4 * (64 - 8) / 4


def test_shards_without_a_memory_pass_it_on():
    """Each of four devices has the tokens of one memory; a document starts on the third."""
    rng = np.random.default_rng(3)
    mixer = built(top_k=1)
    turn = np.repeat(np.eye(4)[[0, 1, 2, 0]], T // 4, 0)
    x = tokens(9 * np.broadcast_to(turn, (B, T, 4)), rng)
    reset = np.zeros((B, T), bool)
    reset[0, 14] = True
    run = lambda x, state, reset: mixer(x, state, reset=reset)
    state = jax.jit(run)(x[:, ::-1], mixer.init_state(B), reset)[1]
    expected = jax.jit(run)(x, state, reset)
    with use_mesh(seq=4):
        assert_close(jax.jit(lambda *args: run(*args))(x, state, reset), expected)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("room", [0, 3])
def test_every_choice_has_a_slot_in_a_chunk_of_its_memory(few, room):
    rng = np.random.default_rng(4)
    M, k, chunk, length = 3, 2, 4, 150
    chosen = np.argsort(rng.random((B, length, M)) * [1, 2, 4], -1)[..., :k]
    reset = rng.random((B, length)) < (0 if few else 0.4)
    slots = jax.tree.map(
        np.asarray, jax.jit(laid, static_argnums=(2, 3, 4))(chosen, reset, M, chunk, room)
    )
    chunks = slots.owner.reshape(B, -1, chunk)
    assert (chunks == chunks[..., :1]).all()
    document = np.cumsum(reset, 1)
    for b in range(B):
        assert slots.filled[b].sum() == length * k
        np.testing.assert_array_equal(
            slots.source[b, slots.place[b]].ravel(), np.arange(length * k)
        )
        for m in range(M):
            held = slots.filled[b] & (slots.owner[b] == m)
            times = slots.source[b, held] // k
            np.testing.assert_array_equal(times, np.nonzero((chosen[b] == m).any(-1))[0])
            starts = np.diff(document[b, times], prepend=0) != 0
            np.testing.assert_array_equal(slots.reset[b, held], starts)
            assert not slots.filled[b, slots.room[b, m]].any()


def test_load_balance_is_k_when_every_memory_is_used_alike():
    chosen = np.stack([np.arange(T), np.arange(T) + 1], -1)[None] % 4
    even = jnp.full((1, T, 4), 0.25)
    with auxiliary.collect() as found:
        auxiliary.load_balance(even, jnp.asarray(chosen), 0.5)
        auxiliary.load_balance(jnp.eye(4)[chosen[..., 0] * 0], jnp.asarray(chosen * 0), 0.5)
    total = found["load_balance"]
    assert float(total.value) == pytest.approx(2 + 8)  # all to one memory: the number of memories
    assert float(total.mean().loss) == pytest.approx(0.5 * (2 + 8) / 2)


def test_padding_has_no_say_in_the_balance():
    chosen = np.where(np.arange(T) < 12, np.arange(T) % 4, 0)[None, :, None]
    counts = jnp.arange(T)[None] < 12
    with auxiliary.collect() as found, auxiliary.counting(counts):
        auxiliary.load_balance(jnp.eye(4)[chosen[..., 0]], jnp.asarray(chosen), 1.0)
    assert float(found["load_balance"].value) == pytest.approx(1)


def test_a_step_adds_the_balance_and_reports_it():
    """Through the scan over depth, recomputation and a batch in parts; padding has no say."""
    rng = np.random.default_rng(5)
    ids = np.repeat([[1] * 12 + [2] * 8 + [0] * 5], 4, 0)
    batch = Batch(rng.integers(0, 9, ids.shape, np.int32), ids.astype(np.int32))
    small = {"base": "linear", "conv_width": 0, "shared_memory": False}
    pattern = (mom.Config(aux_scale=3.0, **small),)
    model = lm.Config(vocab=9, d_model=D, pattern=pattern, repeats=2, remat="cheap", ffn=None)
    model = jax.jit(lambda config=model: config.build(rngs=nnx.Rngs(0)))()
    params = parameters(model)
    optimizer = Optimizer().build(10, decays(model))
    names = [name for name in params if "router" in name]
    objective = lambda params, batch: step.objective(step.bind(model, params), batch)
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (nats, (total, seen)), grads = run(params, batch)
    padded = Batch(np.where(ids == 0, 3, batch.tokens), batch.segment_ids)
    assert run(params, padded)[0] == (nats, (total, seen))
    alone = jax.jit(jax.grad(lambda params: step.loss(step.bind(model, params), batch).nats))
    value = float(seen["load_balance"] / total.tokens)
    assert 1.9 < value < 4 and float(nats) == pytest.approx(
        float(total.nats + total.tokens * 3 * value), rel=1e-6
    )
    expected = alone(params)
    assert any(not np.allclose(grads[n], expected[n], rtol=1e-2) for n in names)
    made = step.make_step(model, optimizer, accumulate=2)
    _, _, metrics = made(params, optimizer.init(params), batch)
    assert float(metrics["load_balance"]) == pytest.approx(value, rel=0.1)
    assert float(metrics["loss"]) == pytest.approx(float(total.nats / total.tokens), rel=1e-5)


def test_state_bytes_are_those_of_the_definition():
    c = mom.Config(memories=3, heads=2, key_dim=4, value_dim=6)
    model = lm.Config(vocab=9, d_model=D, pattern=(c,), repeats=2).build(rngs=nnx.Rngs(0))
    memory, conv = 2 * 4 * 6 * 4, 3 * 2 * (2 * 4 + 6) * 4
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_state(1)))
    assert state_bytes(model) == 2 * (3 + 1) * (memory + conv) == real


def test_more_choices_than_memories_are_refused():
    with pytest.raises(ConfigError, match="top_k=5 is more than the 4 memories"):
        mixer_config("mom", top_k=5)
