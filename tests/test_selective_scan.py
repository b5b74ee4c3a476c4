"""The selective scan: its chunked form agrees with the definition, and keeps only states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels.selective_scan import all_at_once, selective_scan, token_by_token
from seqlab.parallel.mesh import use_mesh

B, E, N = 2, 8, 4


def tokens(T, *, strength=1.0, resets=0.1, dtype=jnp.float32):
    """Random arguments; dt is exponential with mean `strength`."""
    ku, kd, kb, kc, kr, ka, ks = jax.random.split(jax.random.key(T), 7)
    return (
        jax.random.normal(ku, (B, T, E), dtype),
        strength * jax.random.exponential(kd, (B, T, E)),
        jax.random.normal(kb, (B, T, 1, N), dtype),
        jax.random.normal(kc, (B, T, 1, N), dtype),
        jax.random.bernoulli(kr, resets, (B, T)),
        -jax.random.uniform(ka, (E, N), maxval=2.0),
        jax.random.normal(ks, (B, E, N)),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(implementation, chunk_size, u, dt, b, c, reset, A, state):
    def loss(u, dt, b, c, A, state):
        y, last = selective_scan(
            u, dt, b, c, reset, A, state, implementation=implementation, chunk_size=chunk_size
        )
        # linear, since y may be so large that rounding it turns its sine
        ends = (jnp.cos(jnp.arange(a.size, dtype=a.dtype)) @ a.ravel() for a in (y, last))
        return sum(ends), (y, last)

    both = jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True)
    (_, out), grads = both(u, dt, b, c, A, state)
    return out, grads


def wide(args):
    return [np.asarray(a, bool if a.dtype == bool else np.float64) for a in args]


@pytest.mark.parametrize("T,chunk_size", [(2, 16), (37, 16)])
def test_outputs_and_gradients_agree_with_the_definition(T, chunk_size):
    args = tokens(T)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, value_and_gradients("reference", 64, *wide(args)))
        value, gradients = value_and_gradients("xla", chunk_size, *wide(args))
        assert_close(value, expected[0])
        assert_close(gradients, expected[1], GRADIENT)
    value, gradients = value_and_gradients("xla", chunk_size, *args)
    assert_close(value, expected[0])
    assert_close(gradients, expected[1], GRADIENT)


@pytest.mark.parametrize("T", [2, 19])
def test_the_form_for_accelerators_agrees_with_the_one_for_processors(T):
    with jax.enable_x64(True):
        u, dt, b, c, reset, A, state = map(jnp.asarray, wide(tokens(T)))
        chunk = u, dt, b[:, :, 0], c[:, :, 0], reset, A.T, state.mT
        dy, D = jnp.cos(u), jnp.sin(state.mT)
        assert_close(all_at_once.forward(*chunk), token_by_token.forward(*chunk))
        fast, slow = (form.backward(*chunk, dy, D) for form in (all_at_once, token_by_token))
        assert_close(fast, slow, GRADIENT)


@pytest.mark.parametrize("strength", [1e-6, 80.0])
def test_any_step_size_is_exact_and_finite(strength):
    args = tokens(37, strength=strength)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, value_and_gradients("reference", 64, *wide(args)))
    value, gradients = value_and_gradients("xla", 16, *args)
    assert_close(value, expected[0])
    assert_close(gradients, expected[1], GRADIENT)


def test_documents_exchange_exactly_nothing():
    u, dt, b, c, _, A, state = tokens(37)
    reset = jnp.zeros((B, 37), bool).at[:, 21].set(True)
    quiet, _ = value_and_gradients("xla", 16, u, dt, b, c, reset, A, state)
    loud = u.at[:, :21].multiply(1e6), dt, b, c, reset, A, 1e6 * state
    loud, _ = value_and_gradients("xla", 16, *loud)
    np.testing.assert_array_equal(quiet[0][:, 21:], loud[0][:, 21:])
    np.testing.assert_array_equal(quiet[1], loud[1])


def test_the_transition_is_what_the_definition_does_to_a_state():
    for resets in (0.0, 0.1):
        *stretch, state = tokens(37, resets=resets)
        expected = selective_scan(*stretch, state, implementation="reference")[1]
        assert_close(selective_scan.transition(*stretch, chunk_size=16)(state), expected)


@pytest.mark.parametrize("strategy", ["all_gather", "all_scan"])
def test_every_strategy_equals_one_device(strategy):
    args = tokens(40, resets=0.03)
    expected, expected_gradients = value_and_gradients("xla", 16, *args)
    with use_mesh(data=2, seq=2, model=2, strategy=strategy):
        sharded = jax.jit(value_and_gradients.__wrapped__, static_argnums=(0, 1))
        actual, gradients = sharded("xla", 16, *args)
    assert_close(actual, expected)
    assert_close(gradients, expected_gradients, GRADIENT)


def test_bfloat16_tokens_keep_a_float32_state():
    args = tokens(37, dtype=jnp.bfloat16)
    (y, state), gradients = value_and_gradients("xla", 16, *args)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in gradients[:3]] == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    narrow = (a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in args)
    assert_close(y, value_and_gradients("reference", 64, *narrow)[0][0])


def test_the_backward_pass_keeps_only_states_at_chunk_boundaries():
    args, chunk_size = tokens(256), 32
    run = functools.partial(selective_scan, implementation="xla", chunk_size=chunk_size)
    saved = jax.eval_shape(lambda u: jax.vjp(lambda u: run(u, *args[1:])[0], u)[1], args[0])
    kept = sum(leaf.size for leaf in jax.tree.leaves(saved))
    assert kept <= sum(a.size for a in args) + (256 // chunk_size + 2) * B * E * N
