"""The scan in XLA. Its backward pass is the same scan in reverse:

    lambda_t = dh_t + conj(a_{t+1}) lambda_{t+1}
    da_t = lambda_t conj(h_{t-1})     db_t = lambda_t     dh_0 = conj(a_1) lambda_1

with lambda the cotangent of h in the recurrence, dh that of the outputs (Martin & Cundy, 2018).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.kept import kept
from seqlab.kernels.linear_scan.planes import one_like
from seqlab.kernels.precision import widen
from seqlab.kernels.transition_scan import one_by_one, side_by_side
from seqlab.parallel.transitions import Diagonal

_each = jax.tree.map  # a number is an array or the planes of a Complex


def scanned(a, b, reset, state):
    """The definition's arguments and results."""
    h = _scan(*_masked(a, b, reset), state)
    last = _each(lambda h: h[:, -1], h)
    return _each(lambda h, b: h.astype(b.dtype), h, b), last


def transition(a, b, reset) -> Diagonal:
    """What these tokens do to the state [B, ...] that enters them."""
    a, b = _masked(a, b, reset)
    zero = _each(lambda b: jnp.zeros_like(b[:, 0]), b)
    decay = _scan(a, _each(jnp.zeros_like, b), one_like(zero))
    update = _scan(a, b, zero)
    return _each(lambda h: h[:, -1], Diagonal(decay, update))


def _masked(a, b, reset):
    """a and b in float32 or wider; at a document's start a is 0."""
    first = lambda a: reset.reshape(*reset.shape, *[1] * (a.ndim - 2))
    return _each(lambda a: jnp.where(first(a), 0, widen(a)), a), _each(widen, b)


@jax.custom_vjp
def _scan(a, b, state):
    """h_t = a_t h_{t-1} + b_t [B, T, ...]"""
    tokens = Diagonal(a, b)
    nothing = Diagonal(one_like(state), _each(jnp.zeros_like, state))
    parallel = lambda tokens, state: side_by_side(tokens, nothing, state)
    return lax.platform_dependent(tokens, state, cpu=one_by_one, default=parallel)


def _forward(a, b, state):
    h = kept(_scan(a, b, state))
    return h, (a, state, h)


def _backward(saved, dh):
    a, state, h = saved
    later = _each(lambda a: jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], 1), a.conj())
    reverse = functools.partial(_each, lambda a: jnp.flip(a, 1))
    d_state = _each(jnp.zeros_like, state)
    db = reverse(_scan(reverse(later), reverse(dh), d_state))
    before = _each(lambda s, h: jnp.concatenate([s[:, None], h[:, :-1]], 1), state, h)
    first = lambda tree: _each(lambda a: a[:, 0], tree)
    return db * before.conj(), db, first(a).conj() * first(db)


_scan.defvjp(_forward, _backward)
