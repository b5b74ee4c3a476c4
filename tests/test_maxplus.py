"""The running maximum of exponential gates: its forms agree, and sums in its unit are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import assert_close
from seqlab.kernels.maxplus_scan import maxplus_scan, stabilise
from seqlab.parallel.mesh import use_mesh

B, T, H = 2, 40, 4


def gates(strength=1.0, resets=0.1):
    kf, ki, kr, ks = jax.random.split(jax.random.key(0), 4)
    return (
        -strength * jax.random.exponential(kf, (B, T, H)),
        5 * strength * jax.random.normal(ki, (B, T, H)),
        jax.random.bernoulli(kr, resets, (B, T)),
        jax.random.normal(ks, (B, H)),
    )


def in_float64(f, *args):
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64 if a.dtype != bool else bool) for a in args]
        return jax.tree.map(np.asarray, f(*map(jnp.asarray, wide)))


@pytest.mark.parametrize("initial", [0.0, -jnp.inf])
def test_all_forms_agree_with_the_definition_in_float64(initial):
    for strength in (1e-3, 1.0, 80.0):
        args = gates(strength)
        run = lambda *a, form: maxplus_scan(*a, initial=initial, implementation=form)
        expected = in_float64(lambda *a: run(*a, form="reference"), *args)
        assert_close(run(*args, form="xla"), expected)
        assert_close(run(*args, form="reference"), expected)


def test_the_transition_is_what_the_definition_does_to_a_state():
    for resets in (0.0, 0.1):
        *stretch, state = gates(resets=resets)
        expected = maxplus_scan(*stretch, state, implementation="reference")[1]
        assert_close(maxplus_scan.transition(*stretch)(state), expected)


@pytest.mark.parametrize("strategy", ["all_gather", "all_scan"])
def test_every_strategy_equals_one_device(strategy):
    args = gates(resets=0.03)
    expected = maxplus_scan(*args)
    with use_mesh(data=2, seq=2, model=2, strategy=strategy):
        assert_close(jax.jit(lambda *a: maxplus_scan(*a))(*args), expected)


@pytest.mark.parametrize("initial", [0.0, -jnp.inf])
def test_a_quotient_of_stabilised_sums_is_that_of_the_plain_sums(initial):
    log_decay, log_input, reset, _ = gates(0.3)
    state = jnp.full((B, H), initial)
    values = jax.random.normal(jax.random.key(1), (B, T, H))

    def quotient(decay, write, values):
        def step(sums, token):
            decay, write, value, reset = token
            sums = jnp.where(reset[:, None], 0.0, sums)
            sums = decay * sums + write * jnp.stack([value, jnp.ones_like(value)])
            return sums, sums[0] / sums[1]

        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (decay, write, values, reset))
        return jax.lax.scan(step, jnp.zeros((2, B, H), values.dtype), tokens)[1]

    def stabilised(log_decay, log_input, values):
        gates, _ = stabilise(log_decay, log_input, reset, state, initial=initial)
        return jnp.sum(jnp.sin(quotient(jnp.exp(gates[0]), jnp.exp(gates[1]), values)))

    def plain(log_decay, log_input, values):
        return jnp.sum(jnp.sin(quotient(jnp.exp(log_decay), jnp.exp(log_input), values)))

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (log_decay, log_input, values)]
        state = state.astype(jnp.float64)
        results = [
            jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*wide) for f in (stabilised, plain)
        ]
    assert_close(*results)


def test_stabilised_gates_never_exceed_one_and_masked_inputs_write_nothing():
    log_decay, log_input, reset, _ = gates(80.0)
    log_input = log_input.at[:, :5].set(-jnp.inf)  # nothing is written before token 5
    out, last = stabilise(log_decay, log_input, reset, jnp.full((B, H), -jnp.inf), initial=-jnp.inf)
    assert (out.log_decay <= 0).all() and (out.log_input <= 0).all()
    assert np.isfinite(out.log_decay).all() and np.isfinite(last).all()
    np.testing.assert_array_equal(jnp.exp(out.log_input[:, :5]), 0)


def test_no_gradient_passes_through_the_maximum():
    for form in ("xla", "reference"):
        total = lambda *a, form=form: jnp.sum(maxplus_scan(*a, implementation=form)[0])
        args = gates()
        for gradient in jax.grad(total, argnums=(0, 1, 3))(*args):
            np.testing.assert_array_equal(gradient, 0)
