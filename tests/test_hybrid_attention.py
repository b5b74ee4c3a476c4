"""Published linearizations, held against what their papers define and against softmax attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import assert_close
from seqlab.conformance.trial import step_by_step, whole
from seqlab.errors import ConfigError
from seqlab.layers import feature_maps, norm
from seqlab.layers.feature_memory import Config as Memory
from seqlab.layers.mixers import attention, hybrid_attention
from seqlab.layers.registry import mixer_config
from seqlab.layers.rope import positions
from seqlab.layers.softmax_window import largest_score
from seqlab.linearize.presets import PRESETS
from seqlab.models.parameters import bind, parameters
from tests import linearized as papers
from tests.linearized import SCALE, G, H, K, W, document, f8, sigmoid

B, T, D = 2, 23, 12
TEACHER = attention.Config(
    heads=H, kv_heads=G, head_dim=K, qk_norm=norm.Config(), qkv_bias=True, scale=SCALE
)
#: Fields that make a preset small.
SMALL = {name: {"window": W} for name in PRESETS} | {
    "hedgehog": {},
    "t2r": {},
    "supra": {},
    "swa_sink": {"window": W - 2, "sinks": 2},
}


def mixed(**fields) -> hybrid_attention.Config:
    """With the teacher's projections."""
    return PRESETS["liger"](TEACHER, **{"window": W} | fields)


CASES = {name: PRESETS[name](TEACHER, **SMALL[name]) for name in PRESETS} | {
    "one_gate_a_head": mixed(
        sinks=2,
        window_share=0.25,
        memory=Memory(decay_width=1, decay_normed=True),
    ),
    "fixed_rates": mixed(
        window_rope=False,
        sink_logits=3,
        mix="joint",
        memory=Memory(
            feature_maps.Config("hedgehog", per_head=True, bias=False, joint=False),
            tie_feature_map=True,
            scale=True,
            decay="fixed",
            decay_rates="retention",
            norm="own",
        ),
    ),
}


@functools.cache
def inputs():
    """x [B, T, D] float64, and documents of which one is several windows long, some short."""
    reset = np.zeros((B, T), bool)
    reset[0, 17], reset[1, [3, 4]] = True, True
    return np.random.default_rng(0).normal(size=(B, T, D)), reset


def build(config, d_model=D):
    """In float64, and with nothing at its start."""
    mixer = jax.jit(lambda: config.build(d_model, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: np.asarray(a, "f8") + 0.3 * rng.normal(size=a.shape), mixer)


def wide(state):
    return jax.tree.map(lambda a: a.astype("f8") if a.dtype == "f4" else a, state)


@pytest.mark.parametrize("name", CASES)
def test_a_preset_is_what_its_paper_defines_at_once_and_token_by_token(name):
    """Documents begin where they like, the longest is of several windows."""
    with jax.enable_x64(True):
        mixer, definition = build(CASES[name]), getattr(papers, name)
        x, reset = inputs()
        ways = lambda *given: (whole(*given), step_by_step(*given))
        state = jax.jit(lambda mixer: wide(mixer.init_state(B)))(mixer)
        at_once, by_token = jax.jit(ways)(mixer, x, state, reset)
        for row in range(B):
            for part in np.split(np.arange(T), reset[row].nonzero()[0]):
                y = definition(document(mixer, x[row, part])).reshape(len(part), -1)
                assert_close(at_once.y[row, part], y @ f8(mixer.out.weight))
        assert_close(by_token, at_once)


def taught(mixer, teacher):
    """The mixer with its teacher's weights."""
    held = parameters(teacher)
    return bind(mixer, {name: held.get(name, a) for name, a in parameters(mixer).items()})


def test_a_window_over_everything_without_the_memory_is_the_teacher():
    """To the bit; and so is LoLCATs, up to rounding, before anything has left the window."""
    with jax.enable_x64(True):
        teacher = build(dataclasses.replace(TEACHER, max_length=T, cap=2.0))
        x, reset = inputs()
        answer = lambda mixer: jax.jit(whole)(mixer, x, wide(mixer.init_state(B)), reset).y
        y = answer(teacher)
        near = {"window": T, "window_share": 1.0}
        for name, fields in {"liger": near, "lolcats": {"window": T}}.items():
            student = taught(build(PRESETS[name](teacher.config, **fields)), teacher)
            got = answer(student)
            assert_close(got, y)
            assert name != "liger" or (got == y).all()


@pytest.mark.parametrize("length", [1, W - 1, T])
def test_the_largest_score_is_that_of_all_that_a_query_sees(length):
    """Keys before these are seen where the document began with them."""
    r = np.random.default_rng(0)
    q, keys = r.normal(size=(B, length, H, K)), r.normal(size=(B, W + length, G, K))
    position = positions(jnp.asarray(inputs()[1][:, :length]), jnp.array([3, 40], jnp.int32))
    options = {"scale": 0.7, "cap": 2.0}
    expected = np.zeros((B, length, H))
    for b, t, h in np.ndindex(expected.shape):
        first = W + t - min(W - 1, int(position[b, t]))
        seen = keys[b, first : W + t + 1, h // (H // G)] @ q[b, t, h]
        expected[b, t, h] = (2 * np.tanh(0.7 * seen / 2)).max()
    with jax.enable_x64(True):
        q, keys = jnp.asarray(q), jnp.asarray(keys)
        assert_close(largest_score(q, keys[:, W:], keys[:, :W], position, **options), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_projections_of_its_teacher(name):
    teacher = attention.Config(
        heads=8,
        kv_heads=2,
        head_dim=6,
        qk_norm=norm.Config("layer"),
        qk_norm_over="width",
        qkv_bias=True,
        out_bias=True,
        gate=True,
        out_norm=norm.Config(),
    )
    shapes = lambda config: {
        name: a.shape
        for name, a in parameters(jax.eval_shape(lambda: config.build(D, rngs=nnx.Rngs(0)))).items()
    }
    assert shapes(teacher).items() <= shapes(PRESETS[name](teacher)).items()


def test_what_heads_say_becomes_the_output_through_the_last_weights():
    """Also with a gate and a norm behind it, for the teacher and for what takes its place."""
    teacher = dataclasses.replace(TEACHER, gate=True, out_norm=norm.Config(), max_length=T)
    x, reset = inputs()
    with jax.enable_x64(True):
        for config in (teacher, PRESETS["t2r"](teacher)):
            mixer = build(config)
            args = x, wide(mixer.init_state(B)), jnp.asarray(reset)
            (heads, state), (y, after) = jax.jit(lambda *a: (mixer.attend(*a), mixer.mix(*a)))(
                *args
            )
            assert heads.shape == (B, T, H * K)
            gated = heads * sigmoid(x @ f8(mixer.gate.weight) + f8(mixer.gate.bias))
            gated /= np.sqrt((gated**2).mean(-1, keepdims=True) + 1e-6)
            assert_close(y, gated * f8(mixer.out_norm.weight) @ f8(mixer.out.weight))
            assert_close(state, after)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
        ({"window": None, "sinks": 1}, "need a window"),
        ({"window": None, "overlap": False}, "need a window"),
        ({"mix": "joint"}, 'memory.norm="own"'),
        ({"overlap": False}, 'memory.rope="before"'),
        ({"window_share": 1.5}, "window_share = 1.5 is wrong"),
        ({"memory": {"decay_width": 3}}, "decay_width=3 does not divide the 8 channels"),
        ({"memory": {"decay_width": 2}}, "set decay_width to 1 or 8"),
        ({"memory": {"write": "forgotten", "norm": "own"}}, 'other than "own"'),
        ({"memory": {"write": "slots", "decay": "token"}}, 'needs decay="key"'),
        ({"memory": {"rope": "after", "feature_map": {"kind": "dpfp"}}}, "cannot turn"),
        ({"memory": {"norm": "own", "feature_map": {"kind": "identity"}}}, "may sum to zero"),
        (
            {"kv_heads": 2, "memory": {"map_over": "width", "tie_feature_map": True}},
            "keys of 2 heads cannot share the map",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_sentence(fields, message):
    with pytest.raises(ConfigError, match=message):
        mixer_config("hybrid_attention", **fields).build(32, rngs=nnx.Rngs(0))
