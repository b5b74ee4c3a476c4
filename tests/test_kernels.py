"""Every implementation of a recurrence agrees with its definition: outputs, state, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.short_conv import short_conv
from seqlab.parallel.mesh import use_mesh

B, G, H, K, V = 2, 2, 4, 8, 16


def tokens(T, channels, *, strength=1.0, resets=0.1, dtype=jnp.float32):
    """Random arguments; log decays are exponential with mean `strength`."""
    kq, kk, kv, kd, kr, ks = jax.random.split(jax.random.key(T), 6)
    return (
        jax.random.normal(kq, (B, T, G, K), dtype),
        jax.random.normal(kk, (B, T, G, K), dtype),
        jax.random.normal(kv, (B, T, H, V), dtype),
        -strength * jax.random.exponential(kd, (B, T, H, channels)),
        jax.random.bernoulli(kr, resets, (B, T)),
        jax.random.normal(ks, (B, H, K, V)),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(implementation, chunk_size, q, k, v, log_decay, reset, state):
    def loss(q, k, v, log_decay, state):
        y, state = decayed_outer_product(
            q, k, v, log_decay, reset, state, implementation=implementation, chunk_size=chunk_size
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

    both = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
    (_, out), grads = both(q, k, v, log_decay, state)
    return out, grads


def in_float64(*args):
    """The definition, computed in float64: the oracle of this file."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64 if a.dtype != bool else bool) for a in args]
        return jax.tree.map(np.asarray, value_and_gradients("reference", 64, *wide))


@pytest.mark.parametrize("channels", [1, K])
@pytest.mark.parametrize("T,chunk_size", [(2, 16), (63, 32), (96, 32), (40, 64)])
def test_chunked_form_agrees_with_the_definition_in_float64(channels, T, chunk_size):
    args = tokens(T, channels)
    expected, expected_gradients = in_float64(*args)
    actual, gradients = value_and_gradients("xla", chunk_size, *args)
    assert_close(actual, expected)
    assert_close(gradients, expected_gradients, GRADIENT)


@pytest.mark.parametrize("channels", [1, K])
@pytest.mark.parametrize("strength", [1e-6, 1e-3, 20.0, 80.0])
def test_any_gate_strength_is_exact_and_finite(channels, strength):
    args = tokens(96, channels, strength=strength)
    expected, expected_gradients = in_float64(*args)
    actual, gradients = value_and_gradients("xla", 32, *args)
    assert_close(actual, expected)
    assert_close(gradients, expected_gradients, GRADIENT)


@pytest.mark.parametrize("channels", [1, K])
def test_gates_of_every_strength_in_one_chunk_stay_finite(channels):
    q, k, v, _, reset, state = tokens(96, channels)
    log_decay = -jnp.geomspace(1e-6, 80.0, 96)[jax.random.permutation(jax.random.key(0), 96)]
    log_decay = jnp.broadcast_to(log_decay[None, :, None, None], (B, 96, H, channels))
    out = value_and_gradients("xla", 32, q, k, v, log_decay, reset, state)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(out))


@pytest.mark.parametrize("channels", [1, K])
def test_documents_exchange_exactly_nothing(channels):
    q, k, v, log_decay, _, state = tokens(96, channels)
    reset = jnp.zeros((B, 96), bool).at[:, 41].set(True)
    (y, last), _ = value_and_gradients("xla", 32, q, k, v, log_decay, reset, state)
    loud = v.at[:, :41].multiply(1e6)
    (y2, last2), _ = value_and_gradients("xla", 32, q, k, loud, log_decay, reset, 1e6 * state)
    np.testing.assert_array_equal(y[:, 41:], y2[:, 41:])
    np.testing.assert_array_equal(last, last2)


@pytest.mark.parametrize("channels", [1, K])
def test_the_transition_is_what_the_definition_does_to_a_state(channels):
    *stretch, state = tokens(50, channels, resets=0.0)
    definition = functools.partial(decayed_outer_product, implementation="reference")
    transition = functools.partial(decayed_outer_product.transition, chunk_size=16)
    _, after = jax.jit(definition)(*stretch, state)
    assert_close(jax.jit(transition)(*stretch)(state), after)


@pytest.mark.parametrize("strategy", ["all_gather", "all_scan"])
@pytest.mark.parametrize("channels", [1, K])
def test_every_strategy_equals_one_device(strategy, channels):
    args = tokens(64, channels, resets=0.03)
    expected, expected_gradients = value_and_gradients("xla", 16, *args)
    with use_mesh(data=2, seq=2, model=2, strategy=strategy):
        sharded = jax.jit(value_and_gradients.__wrapped__, static_argnums=(0, 1))
        actual, gradients = sharded("xla", 16, *args)
    assert_close(actual, expected)
    assert_close(gradients, expected_gradients, GRADIENT)


def test_a_single_head_stays_whole_on_a_mesh_that_splits_heads():
    *stretch, state = tokens(16, 1)
    *stretch, reset = (a[:, :, :1] if a.ndim > 2 else a for a in stretch)
    args = *stretch, reset, state[:, :1]
    expected = decayed_outer_product(*args)
    with use_mesh(seq=2, model=2):
        assert_close(jax.jit(decayed_outer_product)(*args), expected)


def test_bfloat16_operands_keep_a_float32_state():
    args = tokens(64, K, dtype=jnp.bfloat16)
    (y, state), gradients = value_and_gradients("xla", 32, *args)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in gradients[:3]] == [jnp.bfloat16] * 3
    (expected, _), _ = in_float64(*(a.astype(jnp.float32) if a.dtype != bool else a for a in args))
    assert_close(y, expected)


def test_the_backward_pass_keeps_only_states_at_chunk_boundaries():
    def saved(T):
        args = tokens(T, K)
        vjp = jax.eval_shape(
            lambda *a: jax.vjp(
                lambda q: decayed_outer_product(q, *a[1:], implementation="xla")[0], a[0]
            )[1],
            *args,
        )
        return sum(leaf.size for leaf in jax.tree.leaves(vjp))

    inputs = sum(a.size for a in tokens(256, K)) - B * H * K * V
    assert saved(256) <= inputs + (256 // 64 + 2) * B * H * K * V


def test_an_unknown_implementation_is_named():
    with pytest.raises(ConfigError, match="did you mean 'xla'"):
        decayed_outer_product(*tokens(4, 1), implementation="xlaa")


def test_short_conv_gradients_equal_autodiff_in_float64():
    kw, kx, kr = jax.random.split(jax.random.key(0), 3)
    weight, past = jax.random.normal(kw, (4, 6)), jax.random.normal(kx, (2, 20, 6))
    reset = jax.random.bernoulli(kr, 0.2, (2, 17))
    document = jnp.pad(jnp.cumsum(reset, 1), [(0, 0), (3, 0)])

    def loss(conv, weight, past):
        return jnp.sum(jnp.sin(conv(weight, past)))

    def ours(weight, past):
        return short_conv(weight, past[:, 3:], reset, past[:, :3])[0]

    def by_hand(weight, past):
        taps = []
        for t in range(17):
            same = document[:, t : t + 4] == document[:, t + 3 : t + 4]
            taps.append(jnp.einsum("jd,bjd,bj->bd", weight, past[:, t : t + 4], same))
        return jnp.stack(taps, 1)

    actual = jax.value_and_grad(loss, argnums=(1, 2))(ours, weight, past)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a), jnp.float64) for a in (weight, past))
        expected = jax.value_and_grad(loss, argnums=(1, 2))(by_hand, *wide)
        expected = jax.tree.map(np.asarray, expected)
    assert_close(actual, expected)
