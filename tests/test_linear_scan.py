"""The elementwise linear scan, real and complex: every form agrees with the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels.linear_scan import Complex, linear_scan
from seqlab.kernels.linear_scan.planes import one_like
from seqlab.kernels.transition_scan import one_by_one, side_by_side
from seqlab.parallel.mesh import use_mesh
from seqlab.parallel.transitions import Diagonal

B, E = 2, 4
KINDS = ("real", "complex")


def tokens(kind, T, *, strength=1.0, resets=0.1):
    """Decays of size exp(-strength * an exponential variable), at any angle when complex."""
    ka, kp, kb, kr, ks = jax.random.split(jax.random.key(T), 5)
    size = jnp.exp(-strength * jax.random.exponential(ka, (B, T, E)))
    angle = jax.random.uniform(kp, (B, T, E), maxval=2 * np.pi)
    b, state = jax.random.normal(kb, (2, B, T, E)), jax.random.normal(ks, (2, B, E))
    reset = jax.random.bernoulli(kr, resets, (B, T))
    if kind == "real":
        return size, b[0], reset, state[0]
    return (
        Complex(size * jnp.cos(angle), size * jnp.sin(angle)),
        Complex(*b),
        reset,
        Complex(*state),
    )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(run, a, b, reset, state):
    def loss(a, b, state):
        h, last = run(a, b, reset, state)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((h, last))), (h, last)

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(a, b, state)
    return out, grads


reference = functools.partial(linear_scan, implementation="reference")
chosen = functools.partial(linear_scan, implementation="xla")


def wide(args):
    return jax.tree.map(lambda a: np.asarray(a, bool if a.dtype == bool else np.float64), args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [2, 37])
def test_outputs_and_gradients_agree_with_the_definition(kind, T):
    args = tokens(kind, T)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, value_and_gradients(reference, *wide(args)))
        value, gradients = value_and_gradients(chosen, *wide(args))
        assert_close(value, expected[0])
        assert_close(gradients, expected[1], GRADIENT)
    value, gradients = value_and_gradients(chosen, *args)
    assert_close(value, expected[0])
    assert_close(gradients, expected[1], GRADIENT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_for_accelerators_agrees_with_the_one_for_processors(kind):
    for T in (2, 37):
        a, b, _, state = tokens(kind, T)
        with jax.enable_x64(True):
            a, b, state = jax.tree.map(jnp.asarray, wide((a, b, state)))
            nothing = Diagonal(one_like(state), jax.tree.map(jnp.zeros_like, state))
            parallel = side_by_side(Diagonal(a, b), nothing, state)
            assert_close(parallel, one_by_one(Diagonal(a, b), state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1e-6, 80.0])
def test_any_gate_strength_is_exact_and_finite(kind, strength):
    args = tokens(kind, 37, strength=strength)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, value_and_gradients(reference, *wide(args)))
    value, gradients = value_and_gradients(chosen, *args)
    assert_close(value, expected[0])
    assert_close(gradients, expected[1], GRADIENT)


def test_documents_exchange_exactly_nothing():
    a, b, _, state = tokens("real", 37)
    reset = jnp.zeros((B, 37), bool).at[:, 21].set(True)
    quiet, _ = value_and_gradients(chosen, a, b, reset, state)
    loud, _ = value_and_gradients(chosen, a, b.at[:, :21].multiply(1e6), reset, 1e6 * state)
    np.testing.assert_array_equal(quiet[0][:, 21:], loud[0][:, 21:])
    np.testing.assert_array_equal(quiet[1], loud[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_transition_is_what_the_definition_does_to_a_state(kind):
    for resets in (0.0, 0.1):
        *stretch, state = tokens(kind, 37, resets=resets)
        assert_close(linear_scan.transition(*stretch)(state), reference(*stretch, state)[1])


@pytest.mark.parametrize("strategy", ["all_gather", "all_scan"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_equals_one_device(kind, strategy):
    args = tokens(kind, 40, resets=0.03)
    expected, expected_gradients = value_and_gradients(chosen, *args)
    with use_mesh(data=2, seq=2, model=2, strategy=strategy):
        sharded = jax.jit(lambda *a: value_and_gradients.__wrapped__(chosen, *a))
        actual, gradients = sharded(*args)
    assert_close(actual, expected)
    assert_close(gradients, expected_gradients, GRADIENT)


def test_bfloat16_tokens_keep_a_float32_state():
    a, b, reset, state = tokens("real", 37)
    narrow = [x.astype(jnp.bfloat16) for x in (a, b)]
    h, last = linear_scan(*narrow, reset, state)
    assert (h.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(h, linear_scan(*(x.astype(jnp.float32) for x in narrow), reset, state)[0])
