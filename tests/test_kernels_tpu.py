"""TPU kernels of the chunked families: interpreted against the definitions, and compiled for TPUs.

Memory that nothing has written is NaN. In float64 they are interpreted as one XLA program, in
float32 and bfloat16 step by step as a TPU runs them.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ModelError
from seqlab.kernels import tile_inverse
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.decayed_outer_product import pallas_tpu as outer_product_tpu
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.delta_rule import pallas_tpu as delta_rule_tpu
from seqlab.kernels.on_tpu import layout, narrow_states
from seqlab.parallel.mesh import make_mesh, use_mesh
from seqlab.plan import topology

CHUNK = 16
BY_STEP = pltpu.InterpretParams(uninitialized_memory="nan")
FAMILIES = {
    "outer product": (decayed_outer_product, outer_product_tpu),
    "delta rule": (delta_rule, delta_rule_tpu),
}


def tokens(family, G, H, K, V, channels, normaliser=False, B=1, T=40, dtype: Any = "f8"):
    """Two whole chunks and a part of one, with documents and gates that wipe out everything."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    q, k, v = draw(B, T, G, K), draw(B, T, G, K), draw(B, T, H, V)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    weak = -rng.exponential(size=(B, T, H, channels)) * 0.3
    log_decay = np.where(rng.random(weak.shape) < 0.1, -80.0, weak)
    gates = [log_decay] if family == "outer product" else [2 * rng.random((B, T, H)), log_decay]
    reset, state = rng.random((B, T)) < 0.06, draw(B, H, K, V + normaliser)
    wide = np.promote_types(dtype, np.float32)
    few = [a.astype(dtype) for a in (q, k, v)]
    return *few, *(a.astype(wide) for a in gates), reset, state.astype(wide)


def values_and_gradients(run, args):
    """Results of `run` and what a fixed cotangent of them gives, of all arguments but reset."""
    *floats, reset, state = map(jnp.asarray, args)

    @jax.jit
    def both(floats, state):
        out, pull = jax.vjp(lambda floats, state: run(*floats, reset, state), floats, state)
        weights = lambda a: jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
        return out, pull(jax.tree.map(lambda a: weights(a).astype(a.dtype), out))

    return both(floats, state)


def compare(family, args, interpret, **options):
    definition, module = FAMILIES[family]
    kernel = functools.partial(module.chunked, chunk_size=CHUNK, interpret=interpret, **options)
    reference = functools.partial(definition, implementation="reference", **options)
    actual = values_and_gradients(kernel, args)
    wide = [a if a.dtype == bool else a.astype(np.promote_types(a.dtype, "f4")) for a in args]
    expected = values_and_gradients(reference, wide)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)


@pytest.mark.parametrize(
    "family, G, H, K, V, channels",
    [
        ("outer product", 2, 2, 64, 128, 64),  # two a step, so that a row is full; by channel
        ("delta rule", 1, 4, 128, 64, 1),  # by head; four that share their keys, in two steps
    ],
)
def test_kernels_equal_the_definition(family, G, H, K, V, channels):
    with jax.enable_x64(True):
        compare(family, tokens(family, G, H, K, V, channels), interpret=True)


def test_the_kernel_with_a_normaliser_equals_the_definition():
    args = tokens("outer product", 1, 1, 64, 64, 1, normaliser=True)
    with jax.enable_x64(True):
        compare("outer product", args, interpret=True, normaliser=True)


@pytest.mark.parametrize("family, channels", [("outer product", 1), ("delta rule", 64)])
def test_kernels_read_nothing_that_nobody_wrote(family, channels):
    args = tokens(family, 1, 1, 64, 64, channels, T=24, dtype=np.float32)
    compare(family, args, BY_STEP)


def test_in_bfloat16_kernels_round_where_the_form_in_xla_does():
    definition, module = FAMILIES["delta rule"]
    args = tokens("delta rule", 1, 1, 64, 64, 1, dtype=jnp.bfloat16)
    kernel = functools.partial(module.chunked, chunk_size=CHUNK, interpret=True)
    in_xla = functools.partial(definition, chunk_size=CHUNK, implementation="xla")
    actual, expected = (values_and_gradients(run, args) for run in (kernel, in_xla))
    assert [a.dtype for a in jax.tree.leaves(actual)] == [
        a.dtype for a in jax.tree.leaves(expected)
    ]
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)


@pytest.mark.parametrize("V", [64, 128])
def test_states_with_narrow_keys_are_kept_in_rows_that_others_read_too(V):
    def there_and_back(S, rows, back, *room):
        narrow_states.keep(rows, 0, S[...], room)
        back[...] = narrow_states.kept(rows, 0, room)

    S, (count, width) = jax.random.normal(jax.random.key(0), (V, 64)), (V // 2, 128)
    state = jax.ShapeDtypeStruct((1, 1, 64, V), S.dtype)
    rows, back = pl.pallas_call(
        there_and_back,
        [jax.ShapeDtypeStruct((1, count, width), S.dtype), S],
        scratch_shapes=narrow_states.room(state),
        interpret=True,
    )(S)
    np.testing.assert_array_equal(rows[0], S.T.reshape(count, width))
    np.testing.assert_array_equal(back, S)


@pytest.mark.parametrize("beta", [1.0, 1.95])
def test_inverses_of_equal_keys_do_not_grow(beta):
    M = beta * np.tri(128, k=-1)
    X = np.asarray(jax.jit(tile_inverse.inverse)(jnp.asarray(M, jnp.float32)), np.float64)
    exact = np.linalg.inv(np.eye(128) + M)
    assert np.max(np.abs(X - exact)) < 1e-4


@pytest.mark.parametrize(
    "widths, steps",
    [
        ([(4, 128), (4, 256)], (4, 1, 1)),
        ([(4, 64), (4, 64)], (2, 1, 2)),
        ([(1, 64), (1, 64)], (1, 1, 1)),
        ([(2, 128), (8, 64)], (2, 2, 2)),
        ([(1, 64), (8, 128)], (1, 8, 1)),
        ([(3, 64), (3, 64)], None),
        ([(2, 64), (8, 128)], None),
        ([(2, 128), (6, 64)], None),
    ],
)
def test_a_step_takes_as_many_heads_as_fill_a_row(widths, steps):
    assert layout.heads_per_step(widths) == steps


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_kernels_cannot_do_xla_does(family):
    definition, _ = FAMILIES[family]
    args = tokens(family, 1, 1, 8, 8, 1, T=20, dtype=np.float32)
    expected = definition(*args, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, definition(*args), expected)
    with pytest.raises(ModelError, match="takes keys and values of one dtype and of width 64"):
        definition(*args, implementation="pallas_tpu")


def test_on_a_cpu_nothing_is_kept_for_the_kernels():
    """What a backward pass keeps is the tokens and the states between, as in XLA alone."""
    definition, _ = FAMILIES["outer product"]
    args = tokens("outer product", 1, 1, 64, 64, 1, T=32, dtype=np.float32)

    def compiled(implementation):
        def loss(floats, state):
            y, state = definition(*floats, args[-2], state, implementation=implementation)
            return jnp.sum(y) + jnp.sum(state)

        return jax.jit(jax.grad(loss, (0, 1))).lower(args[:-2], args[-1]).compile()

    chosen, xla = compiled(None), compiled("xla")
    memory = lambda program: program.memory_analysis().temp_size_in_bytes
    assert memory(chosen) <= 1.01 * memory(xla)
    given = (args[:-2], args[-1])
    jax.tree.map(np.testing.assert_array_equal, chosen(*given), xla(*given))


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
@pytest.mark.parametrize("family, channels", [("outer product", 128), ("delta rule", 1)])
def test_on_a_mesh_of_tpus_both_passes_are_kernels(family, channels):
    definition, _ = FAMILIES[family]
    mesh = make_mesh(2, 1, 2, topology.parse("v5e:2x2").devices)
    args = tokens(family, 2, 2, 128, 128, channels, B=2, T=200, dtype=jnp.bfloat16)
    split = lambda a: jax.NamedSharding(mesh, P(*("data", None, "model")[: a.ndim]))
    *floats, reset, state = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split(a)) for a in args[:-1]
    ] + [jax.ShapeDtypeStruct(args[-1].shape, jnp.float32, sharding=jax.NamedSharding(mesh, P()))]

    def loss(floats, reset, state):
        y, state = definition(*floats, reset, state)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    with use_mesh(), jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(floats, reset, state).compile()
    assert str(program.as_text()).count('custom_call_target="tpu_custom_call"') == 2
