"""The normaliser of the decayed outer product, its read before the write, and mixed gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels.decayed_outer_product import decayed_outer_product, read_before_write

B, T, H, K, V = 2, 90, 2, 8, 8  # six chunks of 16, which run two at a time


def tokens(channels, gates):
    """q, k, v, log_decay, reset in float64; `gates` -> log decays of the shape it is given."""
    rng = np.random.default_rng(channels)
    reset = rng.random((B, T)) < 0.08
    return *rng.normal(size=(3, B, T, H, K)), gates(rng, (B, T, H, channels)), reset


def usual(rng, shape):
    return -rng.exponential(size=shape)


def mixed(rng, shape):
    """Gates that wipe out everything, among gates that keep nearly all."""
    return np.where(rng.random(shape) < 0.2, -80.0, -1e-3)


def differentiated(f, width=V):
    """values and gradients of every floating argument, in the dtype of the arguments"""

    def loss(floats, reset):
        q, k, v, log_decay, *bonus, state = floats
        out = f(q, k, v, log_decay, *bonus, reset, state)
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(out)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def compare(fast, definition, args, state, dtype):
    *floats, reset = args
    floats = (*floats, state)
    with jax.enable_x64(True):
        expected = differentiated(definition)(floats, reset)
        (_, out), gradients = differentiated(fast)(
            tuple(jnp.asarray(a, dtype) for a in floats), reset
        )
        assert_close(out, expected[0][1])
        assert_close(gradients, expected[1], GRADIENT)


def of(implementation, **options):
    return functools.partial(
        decayed_outer_product, implementation=implementation, chunk_size=16, **options
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("channels", [1, K])
def test_strong_gates_among_weak_ones_are_exact(channels, dtype):
    state = np.random.default_rng(1).normal(size=(B, H, K, V))
    compare(of("xla"), of("reference"), tokens(channels, mixed), state, dtype)


@pytest.mark.parametrize("channels", [1, K])
def test_the_normaliser_is_the_sum_of_decayed_keys(channels):
    state = np.random.default_rng(1).normal(size=(B, H, K, V + 1))

    def two_memories(q, k, v, log_decay, reset, state):
        run = of("reference")
        y, memory = run(q, k, v, log_decay, reset, state[..., :-1])
        ones = jnp.ones_like(v[..., :1])
        norm, sums = run(q, k, ones, log_decay, reset, state[..., -1:])
        return (y, norm[..., 0]), jnp.concatenate([memory, sums], -1)

    fast = of("xla", normaliser=True)
    compare(fast, two_memories, tokens(channels, usual), state, "float64")


def test_a_normaliser_of_bfloat16_values_is_float32():
    q, k, v, log_decay, reset = (jnp.asarray(a) for a in tokens(1, usual))
    q, k, v = (a.astype(jnp.bfloat16) for a in (q, k, v))
    state = jnp.zeros((B, H, K, V + 1), jnp.float32)
    for T in (1, 90):
        cut = (a[:, :T] for a in (q, k, v, log_decay.astype(jnp.float32), reset))
        (y, norm), after = decayed_outer_product(*cut, state, normaliser=True)
        assert (y.dtype, norm.dtype, after.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


@pytest.mark.parametrize("gates", [usual, mixed])
def test_reading_before_the_write_equals_its_definition(gates):
    rng = np.random.default_rng(1)
    state, bonus = rng.normal(size=(B, H, K, V)), rng.normal(size=(H, K))
    *floats, reset = tokens(K, gates)

    def definition(q, k, v, log_decay, bonus, reset, state):
        def step(S, token):
            q, k, v, log_decay, reset = token
            S = jnp.where(reset[:, None, None, None], 0.0, S)
            written = k[..., None] * v[..., None, :]
            y = jnp.einsum("bhk,bhkv->bhv", q, S + bonus[..., None] * written)
            return jnp.exp(log_decay)[..., None] * S + written, y

        by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, log_decay, reset))
        state, y = lax.scan(step, state, by_time)
        return jnp.moveaxis(y, 0, 1), state

    fast = functools.partial(read_before_write, implementation="xla", chunk_size=16)
    compare(fast, definition, (*floats, bonus, reset), state, "float64")
