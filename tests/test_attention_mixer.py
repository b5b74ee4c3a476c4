"""Softmax attention as a mixer: positions, rotation, what its slots keep, and its law."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError, ModelError
from seqlab.layers import norm as norms
from seqlab.layers.mixers.attention import Config
from seqlab.layers.registry import mixer_config
from seqlab.layers.ring import Ring
from seqlab.layers.rope import Yarn, positions, rope

B = 2


def test_positions_count_from_the_start_of_each_document():
    reset = np.zeros((2, 6), bool)
    reset[0, 2] = reset[0, 5] = reset[1, 0] = True
    expected = [[7, 8, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    got = positions(jnp.asarray(reset), jnp.array([7, 3], jnp.int32))
    assert got.dtype == jnp.int32 and got.tolist() == expected


def test_rope_is_a_rotation_of_complex_numbers():
    r = np.random.default_rng(0)
    x, at = r.normal(size=(B, 5, 3, 8)), r.integers(0, 1000, (B, 5))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * at[..., None, None] * 100.0 ** (-np.arange(4) / 4)
    )
    with jax.enable_x64(True):
        got = rope(jnp.asarray(x), jnp.asarray(at), 100.0)
        assert_close(got, np.concatenate([turned.real, turned.imag], -1))


# the mixer

T, D = 42, 12
MIXERS = {
    "full": Config(heads=2, max_length=T),
    "window": Config(heads=3, kv_heads=1, window=5, rope_base=None, qkv_bias=True),
    "gated": Config(
        heads=4,
        kv_heads=2,
        head_dim=8,
        max_length=T,
        rope_fraction=0.5,
        rope_scaling=Yarn(factor=4.0, length=16, fast=4.0, gain=1.1),
        qk_norm=norms.Config(eps=1e-5, offset=True),
        qk_norm_over="width",
        out_bias=True,
        gate=True,
        scale=0.5,
    ),
    "sinks": Config(
        heads=4, kv_heads=2, head_dim=6, window=5, sinks=2, qk_norm=norms.Config(), cap=2.0
    ),
}


@functools.cache
def build(config):
    mixer = jax.jit(lambda: config.build(D, rngs=nnx.Rngs(0)))()
    normal = lambda a: np.random.default_rng(a.size).normal(size=a.shape).astype(a.dtype)
    return jax.tree.map(lambda a: a + 0.3 * normal(a), mixer)  # biases and norms off their start


def inputs(seed=0, resets=3):
    """x [B, T, D], reset [B, T]; one document per row if resets == 0."""
    r = np.random.default_rng(seed)
    reset = np.zeros((B, T), bool)
    for row in reset[:, 1:]:
        row[r.choice(T - 1, resets, replace=False)] = True
    return jnp.asarray(r.normal(size=(B, T, D))), jnp.asarray(reset)


def feed(run, x, reset, cuts, state=None):
    """The outputs of the pieces between cuts, joined, and the last state."""
    ys = []
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = run(x[:, start:stop], state, reset=reset[:, start:stop])
        ys.append(y)
    return jnp.concatenate(ys, 1), state


@pytest.mark.parametrize("name", MIXERS)
def test_pieces_equal_the_whole_across_ring_and_resets(name):
    with jax.enable_x64(True):
        mixer = build(MIXERS[name])
        empty = jax.tree.map(
            lambda a: a.astype(jnp.promote_types(a.dtype, "f8")) if a.dtype == "f4" else a,
            mixer.init_state(B),
        )
        run = jax.jit(mixer.__call__)
        for seed, resets in [(0, 3), (1, 0)]:
            x, reset = inputs(seed, resets)
            whole = feed(run, x, reset, [], empty)
            assert whole[0].dtype == whole[1].k.dtype == jnp.float64
            for cuts in [range(1, T), [1, 8, 15, 16, 23, 30, 37, *range(38, T)]]:
                assert_close(feed(run, x, reset, cuts, empty), whole)


def test_slots_keep_the_first_tokens_and_a_ring_of_the_last():
    """The layout that saved states rely on."""
    ends = jnp.array([0, 1, 3, 9], jnp.int32)
    expected = [[-1] * 6, [0] + [-1] * 5, [0, 1, 2, -1, -1, -1], [0, 1, 6, 7, 8, 5]]
    assert Ring(window=4, sinks=2).held(ends).tolist() == expected


def test_the_state_of_a_packed_row_is_that_of_its_last_document():
    mixer = build(MIXERS["sinks"])
    x, _ = inputs()
    x = x.astype(jnp.float32)
    reset = jnp.zeros((B, T), bool).at[:, 30].set(True)
    y, state = jax.jit(mixer.__call__)(x, None, reset=reset)
    alone = jax.jit(mixer.__call__)(x[:, 30:], None)
    assert_close((y[:, 30:], state), alone)
    assert state.position.tolist() == [12, 12]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_writes_its_slot_and_neither_copies_nor_rewrites_the_state(batch):
    """As it is compiled here, in a loop: the state of a long text is most of what there is."""
    mixer = Config(heads=4, kv_heads=2, max_length=700).build(16, rngs=nnx.Rngs(0))
    state, x = mixer.init_state(batch), jnp.ones((batch, 1, 16))

    def steps(x, state):
        return jax.lax.fori_loop(0, 650, lambda _, carry: mixer(*carry), (x, state))

    program = jax.jit(steps, donate_argnums=1).lower(x, state).compile().as_text()
    results = re.findall(rf"= f32\[{batch},(?:2,700|700,2),4\]\S* ([\w-]+)\(", program)
    assert {"dynamic-update-slice", "scatter"} & set(results)
    assert not {"copy", "select"} & set(results)


def test_waves_are_not_computed_again_for_every_head():
    """As compiled here: what is fused with the rotation is done for each of its numbers."""
    x, at = jnp.ones((1, 32, 8, 16)), jnp.arange(32)[None]
    program = jax.jit(rope, static_argnums=2).lower(x, at, 1e4).compile().as_text()
    waves = [part for part in program.split("\n}") if " cosine(" in part or " sine(" in part]
    assert waves and not any("concatenate" in part for part in waves)


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_each_output_depends_on_exactly_the_tokens_it_may_see(name):
    """Also far behind the window and over a cut: sinks stay, everything else is forgotten."""
    config = MIXERS[name]
    mixer = build(config)
    x = inputs(2)[0][:1].astype(jnp.float32)
    reset = jnp.zeros((1, T), bool).at[0, 4].set(True)

    def last_of_each(x):
        y, _ = feed(mixer, x, reset, [20])
        return jnp.sum(y[0], -1)  # [T]

    touched = (jax.jit(jax.jacrev(last_of_each))(x)[:, 0] != 0).any(-1)
    t, s = np.arange(T)[:, None], np.arange(T)
    start = np.where(t < 4, 0, 4)
    expected = (s <= t) & (s >= start)
    expected &= (t - s < config.window) | (s - start < config.sinks)
    assert (touched == expected).all()


def test_gradients_pass_through_the_state():
    with jax.enable_x64(True):
        mixer = build(MIXERS["sinks"])
        x, reset = inputs(3, resets=1)
        state = jax.jit(mixer.__call__)(x[:, :9], None, reset=reset[:, :9])[1]
        state = jax.tree.map(lambda a: a.astype("f8") if a.dtype == "f4" else a, state)

        def loss(mixer, kv, x, cuts):
            y, last = feed(mixer, x, reset, cuts, state._replace(k=kv[0], v=kv[1]))
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last.k)) + jnp.sum(jnp.cos(last.v))

        gradient = lambda cuts: jax.jit(
            jax.grad(lambda mixer, kv, x: loss(mixer, kv, x, cuts), argnums=(0, 1, 2))
        )(jax.tree.map(lambda a: a.astype("f8"), mixer), (state.k, state.v), x)
        whole = gradient([])
        assert all((jnp.abs(g) > 0).any() for g in jax.tree.leaves(whole))
        assert_close(gradient([15]), whole, GRADIENT)


def test_a_state_can_be_donated():
    mixer = build(MIXERS["window"])
    run = jax.jit(mixer.__call__, donate_argnums=1)
    y, state = run(jnp.ones((B, 1, D)), mixer.init_state(B))
    assert run(jnp.ones((B, 1, D)), state)[1].position.tolist() == [2, 2]


def test_low_precision_input_keeps_its_dtype_and_a_float32_state():
    mixer = build(MIXERS["window"])
    x, reset = inputs()
    run = jax.jit(mixer.__call__)
    y, state = run(x.astype(jnp.bfloat16), None, reset=reset)
    assert y.dtype == jnp.bfloat16 and state.k.dtype == state.v.dtype == jnp.float32
    expected, _ = run(x.astype(jnp.float32), None, reset=reset)
    assert_close(y, expected)


def test_full_attention_refuses_more_tokens_than_it_holds():
    mixer = build(Config(heads=2, max_length=8))
    assert mixer.max_length == 8 and build(MIXERS["window"]).max_length is None
    x = jnp.ones((1, 9, D))
    for run in (mixer, jax.jit(mixer.__call__)):
        with pytest.raises(ModelError, match="max_length=8 cannot hold 9 tokens"):
            run(x, None)
    _, state = jax.jit(mixer.__call__)(x[:, :6], None)
    with pytest.raises(ModelError, match="max_length=8 cannot hold 9 tokens"):
        mixer(x[:, :3], state)


def test_a_traced_document_that_outgrows_full_attention_is_nan_from_there_on():
    run = jax.jit(build(Config(heads=2, max_length=8)).__call__)
    x, reset = jnp.ones((2, 6, D)), jnp.zeros((2, 6), bool)
    _, state = run(x, None, reset=reset)
    y, state = run(x, state, reset=reset.at[1, 1].set(True))
    assert jnp.isnan(y).all(-1).tolist() == [[False] * 2 + [True] * 4, [False] * 6]
    y, state = run(x, state, reset=reset.at[0, 0].set(True))
    assert jnp.isfinite(y[0]).all() and jnp.isnan(y[1, 3:]).all()
    assert all(jnp.isfinite(a).all() for a in state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
        ({"heads": 5}, "d_model=12 is not divisible by heads=5"),
        ({"heads": 4}, "even head_dim, not 3"),
        ({"heads": 0}, "heads = 0 is wrong"),
        ({"window": 0}, "window = 0 is wrong"),
        ({"sinks": 2}, "sinks=2 with window=None"),
        ({"max_length": None}, "set max_length"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_sentence(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixer_config("attention", **fields).build(D, rngs=nnx.Rngs(0))
