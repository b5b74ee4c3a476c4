"""The delta rule's chunked form agrees with its definition: outputs, state, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import assert_close
from seqlab.kernels.delta_rule import delta_rule
from seqlab.parallel.mesh import use_mesh
from tests import forms
from tests.forms import assert_agree, values_and_gradients

B, G, H, K, V = 2, 2, 4, 8, 16
T, CHUNK = 72, 32  # two whole chunks and a part of one, the same everywhere: few compilations
KINDS = pytest.mark.parametrize("channels", [1, K], ids=["one decay a head", "one a channel"])


def tokens(channels, *, strength=1.0, resets=0.1, dtype=jnp.float32):
    """Random arguments; log decays are exponential with mean `strength`, beta lies in (0, 2)."""
    kq, kk, kv, kb, kd, kr, ks = jax.random.split(jax.random.key(channels), 7)
    unit = lambda a: (a / jnp.linalg.norm(a, axis=-1, keepdims=True)).astype(dtype)
    return (
        jax.random.normal(kq, (B, T, G, K), dtype),
        unit(jax.random.normal(kk, (B, T, G, K))),
        jax.random.normal(kv, (B, T, H, V), dtype),
        2 * jax.random.uniform(kb, (B, T, H)),
        -strength * jax.random.exponential(kd, (B, T, H, channels)),
        jax.random.bernoulli(kr, resets, (B, T)),
        jax.random.normal(ks, (B, H, K, V)),
    )


jitted = values_and_gradients(delta_rule, chunk_size=CHUNK)
in_float64 = functools.partial(forms.in_float64, jitted)


@KINDS
def test_the_chunked_form_agrees_with_the_definition_in_float64(channels):
    args = tokens(channels)
    assert_agree(in_float64("xla", *args), in_float64("reference", *args))


@KINDS
@pytest.mark.parametrize("strength", [1e-6, 1.0, 80.0])
def test_any_gate_strength_is_exact_and_finite(channels, strength):
    args = tokens(channels, strength=strength)
    assert_agree(jitted("xla", *args), in_float64("reference", *args))


@KINDS
def test_gates_of_every_strength_in_one_chunk_stay_exact(channels):
    *args, reset, state = tokens(channels, resets=0.0)
    mixed = -jnp.geomspace(1e-6, 80.0, T)[jax.random.permutation(jax.random.key(0), T)]
    args[4] = jnp.broadcast_to(mixed[None, :, None, None], args[4].shape)
    args = *args, reset, state
    assert_agree(jitted("xla", *args), in_float64("reference", *args))


@KINDS
@pytest.mark.parametrize("beta", [1.0, 1.95])
def test_equal_keys_are_solved_for_without_growth(channels, beta):
    q, k, v, b, log_decay, reset, state = tokens(channels, strength=1e-6, resets=0.0)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    args = (q, k, v, jnp.full_like(b, beta), log_decay, reset, state)
    assert_agree(jitted("xla", *args), in_float64("reference", *args))


@KINDS
def test_documents_exchange_exactly_nothing(channels):
    q, k, v, beta, log_decay, _, state = tokens(channels)
    reset = jnp.zeros((B, T), bool).at[:, 41].set(True)
    (y, last), _ = jitted("xla", q, k, v, beta, log_decay, reset, state)
    loud = v.at[:, :41].multiply(1e6)
    (y2, last2), _ = jitted("xla", q, k, loud, beta, log_decay, reset, 1e6 * state)
    np.testing.assert_array_equal(y[:, 41:], y2[:, 41:])
    np.testing.assert_array_equal(last, last2)


@KINDS
def test_the_transition_is_what_the_definition_does_to_a_state(channels):
    *stretch, state = tokens(channels, resets=0.0)
    _, after = jax.jit(functools.partial(delta_rule, implementation="reference"))(*stretch, state)
    transition = jax.jit(functools.partial(delta_rule.transition, chunk_size=CHUNK))(*stretch)
    assert_close(transition(state), after)


@pytest.mark.parametrize("strategy", ["all_gather", "all_scan"])
@KINDS
def test_every_strategy_equals_one_device(strategy, channels):
    if channels > 1 and strategy != "all_gather":
        pytest.skip("a strategy sees only the transition, which is a matrix in both kinds")
    args = tokens(channels, resets=0.02)
    expected = jitted("xla", *args)
    with use_mesh(data=2, seq=2, model=2, strategy=strategy):
        actual = values_and_gradients(delta_rule, chunk_size=CHUNK)("xla", *args)
    assert_agree(actual, expected)


@KINDS
def test_bfloat16_operands_keep_a_float32_state(channels):
    args = tokens(channels, strength=0.1, dtype=jnp.bfloat16)
    (y, state), gradients = jitted("xla", *args)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in gradients[:3]] == [jnp.bfloat16] * 3
    (expected, _), _ = in_float64("reference", *args)
    assert_close(y, expected)
