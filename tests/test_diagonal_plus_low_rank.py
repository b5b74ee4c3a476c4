"""The recurrence of RWKV-7 in chunks agrees with its definition: outputs, state, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import assert_close
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.diagonal_plus_low_rank import diagonal_plus_low_rank
from seqlab.parallel.mesh import use_mesh
from tests import forms
from tests.forms import assert_agree, values_and_gradients

B, H, K, V = 2, 2, 8, 16
T, CHUNK = 72, 32  # two whole chunks and a part of one, the same everywhere: few compilations
KINDS = pytest.mark.parametrize("channels", [K, 1], ids=["one decay a channel", "one a head"])


def tokens(channels, *, strength=1.0, resets=0.1, dtype=jnp.float32):
    """Random arguments; log decays are exponential with mean `strength`; a, b as in RWKV-7."""
    kq, kk, kv, ka, kb, kd, kr, ks = jax.random.split(jax.random.key(channels), 8)
    a = jax.random.normal(ka, (B, T, H, K))
    a /= -jnp.linalg.norm(a, axis=-1, keepdims=True)
    return (
        jax.random.normal(kq, (B, T, H, K), dtype),
        jax.random.normal(kk, (B, T, H, K), dtype),
        jax.random.normal(kv, (B, T, H, V), dtype),
        a.astype(dtype),
        (-a * jax.random.uniform(kb, (B, T, H, K))).astype(dtype),
        -strength * jax.random.exponential(kd, (B, T, H, channels)),
        jax.random.bernoulli(kr, resets, (B, T)),
        jax.random.normal(ks, (B, H, K, V)),
    )


jitted = values_and_gradients(diagonal_plus_low_rank, chunk_size=CHUNK)
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


def test_documents_exchange_exactly_nothing():
    q, k, v, a, b, log_decay, _, state = tokens(K)
    reset = jnp.zeros((B, T), bool).at[:, 41].set(True)
    (y, last), _ = jitted("xla", q, k, v, a, b, log_decay, reset, state)
    loud = v.at[:, :41].multiply(1e6)
    (y2, last2), _ = jitted("xla", q, k, loud, a, b, log_decay, reset, 1e6 * state)
    np.testing.assert_array_equal(y[:, 41:], y2[:, 41:])
    np.testing.assert_array_equal(last, last2)


def test_the_delta_rule_is_a_special_case():
    q, k, v, a, _, log_decay, reset, state = tokens(K)
    k, beta = -a, jnp.full((B, T, H), 0.7)
    definition = jax.jit(functools.partial(delta_rule, implementation="reference"))
    expected = definition(q, k, v, beta, log_decay, reset, state)
    b, a = beta[..., None] * k, -jnp.exp(log_decay) * k
    actual, _ = jitted("xla", q, b, v, a, b, log_decay, reset, state)
    assert_close(actual, expected)


def test_the_transition_is_what_the_definition_does_to_a_state():
    *stretch, state = tokens(K, resets=0.0)
    definition = functools.partial(diagonal_plus_low_rank, implementation="reference")
    _, after = jax.jit(definition)(*stretch, state)
    transition = functools.partial(diagonal_plus_low_rank.transition, chunk_size=CHUNK)
    assert_close(jax.jit(transition)(*stretch)(state), after)


def test_shards_equal_one_device():
    args = tokens(K, resets=0.02)
    expected = jitted("xla", *args)
    with use_mesh(data=2, seq=2, model=2):
        actual = values_and_gradients(diagonal_plus_low_rank, chunk_size=CHUNK)("xla", *args)
    assert_agree(actual, expected)


def test_bfloat16_operands_keep_a_float32_state():
    args = tokens(K, strength=0.1, dtype=jnp.bfloat16)
    (y, state), gradients = jitted("xla", *args)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in gradients[:5]] == [jnp.bfloat16] * 5
    (expected, _), _ = in_float64("reference", *args)
    assert_close(y, expected)
