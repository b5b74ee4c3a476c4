"""The forms of a recurrence, held against each other: values, gradients, and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.conformance.tolerance import GRADIENT, assert_close


def values_and_gradients(recurrence, **options):
    """f(implementation, *tokens, reset, state) -> (y, state), gradients but of reset; jitted."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, *args):
        *tokens, reset, state = args

        def loss(*args):
            *tokens, state = args
            y, state = recurrence(*tokens, reset, state, implementation=implementation, **options)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

        each = tuple(range(len(tokens) + 1))
        grads, out = jax.grad(loss, argnums=each, has_aux=True)(*tokens, state)
        return out, grads

    return both


def in_float64(run, implementation, *args):
    """What `run`, made by `values_and_gradients`, gives in float64, as numpy's arrays."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64 if a.dtype != bool else bool) for a in args]
        return jax.tree.map(np.asarray, run(implementation, *wide))


def assert_agree(actual, expected):
    """Values and gradients within the tolerances."""
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)
