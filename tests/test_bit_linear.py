"""Linear maps of one kind stand in for those of another; those of 1.58 bits equal their definition.

What is rounded can fall on either side of a half by the last bit of a sum, so that equality is
asked for in float64, where sums of another order agree far closer than any two halves lie.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab import settings
from seqlab.conformance.tolerance import assert_close
from seqlab.errors import ConfigError
from seqlab.kernels.quantize import by_token, ternary
from seqlab.layers import bit_linear, linear_kinds
from seqlab.layers.bit_linear import BitLinear, bit_product
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.mixers import gated_delta_net, gla, mla
from seqlab.models import lm
from seqlab.models.parameters import axes, parameters
from seqlab.parallel.mesh import use_mesh, weight_shardings
from seqlab.train.config import Optimizer
from seqlab.train.corpus import Batch
from seqlab.train.step import make_step

B, T, K, N = 2, 7, 24, 40
CONFIG = lm.Config(
    vocab=32,
    d_model=32,
    pattern=(gla.Config(),),
    repeats=2,
    linear="bit",
    tie_embeddings=False,
)


def operands(dtype=np.float64):
    r = np.random.default_rng(0)
    x, weight = r.normal(size=(B, T, K)), 0.1 * r.standard_t(3, size=(K, N))
    x[0, 0] = 0  # a token of zeros has a scale all the same
    return x.astype(dtype), weight.astype(dtype), (1 + 0.3 * r.normal(size=K)).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(run, *args):
    value = lambda *args: (jnp.sum(jnp.sin(y := run(1e-8, *args).astype(jnp.float64))), y)
    return jax.grad(value, argnums=(0, 1, 2)[: len(jax.tree.leaves(args))], has_aux=True)(*args)


@pytest.mark.parametrize("normed", [True, False])
def test_values_and_gradients_are_those_of_the_definition(normed):
    with jax.enable_x64(True):
        x, weight, gain = operands()
        args = (x, weight, gain if normed else None)
        expected = value_and_gradients(bit_linear.definition, *args)
        actual = value_and_gradients(bit_product, *args)
        assert_close(actual, expected)
        assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[0])) > 1e-3


def test_in_bfloat16_it_is_close_to_float32_and_stays_bfloat16():
    x, weight, gain = operands(np.float32)
    narrow = x.astype(jnp.bfloat16)
    expected = jax.jit(bit_product, static_argnums=0)(1e-8, np.float32(narrow), weight, gain)
    actual = jax.jit(bit_product, static_argnums=0)(1e-8, narrow, weight, gain)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, expected)


def test_codes_are_whole_numbers_and_halves_go_to_even():
    codes, scale = ternary(jnp.array([[0.5, -0.5, 1.5], [-1.5, 3.0, -1.0]]) * 0.75)
    assert float(scale) == 1.0
    np.testing.assert_array_equal(codes, [[0, 0, 1], [-1, 1, -1]])
    codes, scale = by_token(jnp.array([[127.0, -127.0, 2.5, 3.5], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(codes, [[127, -127, 2, 4], [0, 0, 0, 0]])
    assert codes.dtype == jnp.int8 and scale[0, 0] == 1


def test_products_of_whole_numbers_are_exact_in_both_forms():
    r = np.random.default_rng(0)
    x = r.integers(-128, 128, (3, 5, 4096), np.int8)
    weight = r.integers(-1, 2, (4096, 6), np.int8)
    expected = x.astype(np.int64) @ weight.astype(np.int64)
    for form in (bit_linear._integer_product, bit_linear._float_product):
        np.testing.assert_array_equal(jax.jit(form)(x, weight), expected)


def test_the_backward_pass_keeps_what_came_in_and_nothing_else():
    x, weight, gain = operands(np.float32)
    _, back = jax.vjp(functools.partial(bit_product, 1e-8), x, weight, gain)
    held = sorted(a.shape for a in jax.tree.leaves(back))
    assert held == sorted(a.shape for a in (x, weight, gain))


def test_every_projection_of_every_layer_is_replaced_and_no_gate_is():
    pattern = (gla.Config(), gated_delta_net.Config(), mla.Config())
    config = settings.override(CONFIG, ["d_model=64"])
    model = lm.Config(**vars(config) | {"pattern": pattern}).skeleton()
    found = nnx.iter_modules(model)
    kinds = {".".join(map(str, path)): type(module) for path, module in found}
    bit = {name.removeprefix("blocks.") for name, kind in kinds.items() if kind is BitLinear}
    dense = {name.removeprefix("blocks.") for name, kind in kinds.items() if kind is Linear}
    ffn = {f"{i}.ffn.{name}" for i in range(3) for name in ("gate", "up", "down")}
    gla_, delta = ({f"{i}.mixer.{n}" for n in ("qkv", "gate", "out")} for i in range(2))
    assert bit == ffn | gla_ | delta | {"2.mixer.q", "2.mixer.out", "head"}
    low_rank = {"0.mixer.decay_down", "0.mixer.decay_up", "2.mixer.kv_down", "2.mixer.kv"}
    assert low_rank | {"embed"} <= dense


class Doubling(Mixer):
    """A user's own: y = W_up W_down x, in lists and in modules of its own."""

    def __init__(self, rngs):
        into = Linear(32, 64, ("embed", "ffn"), bias=True, rngs=rngs)
        self.parts = nnx.List([into, Linear(64, 32, ("ffn", "embed"), rngs=rngs)])
        self.gate = Linear(32, 2, ("embed", "heads"), rngs=rngs)


def test_a_layer_of_ones_own_is_served_and_keeps_its_names_weights_and_axes():
    layer, as_it_was = (Doubling(nnx.Rngs(0)) for _ in range(2))
    linear_kinds.replace(layer, linear_kinds.is_projection, bit_linear.Config().replace)
    assert [type(part) for part in layer.parts] == [BitLinear, BitLinear]
    assert type(layer.gate) is Linear, "two numbers a token are no projection"
    ours, before = parameters(layer), parameters(as_it_was)
    assert set(ours) - set(before) == {"parts.0.norm.weight", "parts.1.norm.weight"}
    for name, weight in before.items():
        np.testing.assert_array_equal(ours[name], weight)
    assert axes(layer).items() >= axes(as_it_was).items()


def test_pieces_equal_the_whole():
    """In float64, block by block: a model computes in float32."""
    block = CONFIG.block(CONFIG.pattern[0]).build(CONFIG.d_model, rngs=nnx.Rngs(0))
    linear_kinds.replace(block, linear_kinds.is_projection, CONFIG.linear.replace)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (B, 24, CONFIG.d_model), jnp.float64)
        empty = jax.tree.map(lambda a: a.astype(jnp.float64), block.init_state(B))
        reset = jnp.zeros((B, 24), bool).at[0, 9].set(True)
        run = jax.jit(lambda *args: block(*args)[:2])
        expected, last = run(x, empty, reset)
        first, state = run(x[:, :12], empty, reset[:, :12])
        second, state = run(x[:, 12:], state, reset[:, 12:])
        assert_close((jnp.concatenate([first, second], 1), state), (expected, last))


def test_sharded_weights_are_rounded_by_the_mean_of_the_whole():
    with jax.enable_x64(True):
        args = operands()
        args[1][:, N // 2 :] *= 10  # the mean of one device would be another
        expected = value_and_gradients(bit_product, *args)
        with use_mesh(data=2, model=2) as mesh:
            where = weight_shardings({"w": (K, N)}, {"w": ("embed", "heads")}, mesh)["w"]
            placed = args[0], jax.device_put(args[1], where), args[2]
            actual = value_and_gradients(bit_product, *placed)
        assert_close(actual, expected)


def test_forty_steps_of_training_lower_the_loss():
    model = settings.override(CONFIG, ["repeats=1", "remat=none"]).build(rngs=nnx.Rngs(0))
    tokens = jnp.arange(8 * 17).reshape(8, 17) * 7 % CONFIG.vocab
    batch = Batch(tokens, jnp.ones_like(tokens))
    mask = dict.fromkeys(parameters(model), True)
    optimizer = Optimizer(lr=1e-2, warmup=5).build(40, mask)
    step, params = make_step(model, optimizer), parameters(model)
    state, losses = optimizer.init(params), []
    for _ in range(40):
        params, state, metrics = step(params, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3 and losses[-1] < 0.3 * losses[0], losses[::8]
    assert all(np.isfinite(array).all() for array in params.values())


def test_a_kind_is_one_word_in_a_config_and_an_object_in_a_file():
    plain = settings.plain(CONFIG)
    assert plain["linear"] == {"kind": "bit", "norm": True, "eps": 1e-8, "head": True}
    assert settings.read(lm.Config, plain) == CONFIG
    assert settings.override(CONFIG, ["linear=dense"]).linear == linear_kinds.Dense()
    assert not settings.override(CONFIG, ["linear.norm=false"]).linear.norm


@pytest.mark.parametrize(
    "wrong, message",
    [("bits", "no linear 'bits'.*'bit'"), ({"kind": "bit", "nrm": 1}, "'nrm'.*'norm'")],
)
def test_an_unknown_kind_or_field_is_refused_with_the_nearest(wrong, message):
    with pytest.raises(ConfigError, match=message):
        settings.read(lm.Config, settings.plain(CONFIG) | {"linear": wrong})
