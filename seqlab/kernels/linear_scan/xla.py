"""The scan in XLA. Its backward pass is the same scan in reverse:

    lambda_t = dh_t + conj(a_{t+1}) lambda_{t+1}
    da_t = lambda_t conj(h_{t-1})     db_t = lambda_t     dh_0 = conj(a_1) lambda_1

with lambda the cotangent of h in the recurrence, dh that of the outputs (Martin & Cundy, 2018).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.linear_scan.planes import one_like
from seqlab.kernels.precision import widen
from seqlab.kernels.transition_scan import one_by_one, side_by_side
from seqlab.parallel.transitions import Diagonal

_each = jax.tree.map  # a number is an array or the planes of a Complex


def masked(a, b, reset):
    """a and b in float32 or wider; at a document's start a is 0."""
    first = lambda a: reset.reshape(*reset.shape, *[1] * (a.ndim - 2))
    return _each(lambda a: jnp.where(first(a), 0, widen(a)), a), _each(widen, b)


class InXLA(NamedTuple):
    """The scan as a form of `gradient.scan`."""

    def run(self, a, b, state):
        tokens = Diagonal(a, b)
        nothing = Diagonal(one_like(state), _each(jnp.zeros_like, state))
        parallel = lambda tokens, state: side_by_side(tokens, nothing, state)
        h = lax.platform_dependent(tokens, state, cpu=one_by_one, default=parallel)
        return h, _each(lambda h: h[:, -1], h)

    def backward(self, a, h, state, dh, d_last):
        one = one_like(d_last)
        later = _each(lambda a, one: jnp.concatenate([a[:, 1:], one[:, None]], 1), a.conj(), one)
        reverse = functools.partial(_each, lambda a: jnp.flip(a, 1))
        db = reverse(self.run(reverse(later), reverse(dh), d_last)[0])
        before = _each(lambda s, h: jnp.concatenate([s[:, None], h[:, :-1]], 1), state, h)
        first = lambda tree: _each(lambda a: a[:, 0], tree)
        return db * before.conj(), db, first(a).conj() * first(db)
