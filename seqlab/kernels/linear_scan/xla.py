"""The scan in XLA. Its backward pass is the same scan in reverse:

    lambda_t = dh_t + conj(a_{t+1}) lambda_{t+1}
    da_t = lambda_t conj(h_{t-1})     db_t = lambda_t     dh_0 = conj(a_1) lambda_1

with lambda the cotangent of h in the recurrence, dh that of the outputs (Martin & Cundy, 2018).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.chunk_scan import cut
from seqlab.kernels.linear_scan.planes import conj, one_like
from seqlab.kernels.precision import widen
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
    return lax.platform_dependent(a, b, state, cpu=one_by_one, default=side_by_side)


def _forward(a, b, state):
    h = _scan(a, b, state)
    return h, (a, state, h)


def _backward(saved, dh):
    a, state, h = saved
    later = _each(lambda a: jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], 1), conj(a))
    reverse = functools.partial(_each, lambda a: jnp.flip(a, 1))
    d_state = _each(jnp.zeros_like, state)
    db = reverse(_scan(reverse(later), reverse(dh), d_state))
    before = _each(lambda s, h: jnp.concatenate([s[:, None], h[:, :-1]], 1), state, h)
    first = lambda tree: _each(lambda a: a[:, 0], tree)
    return db * conj(before), db, conj(first(a)) * first(db)


_scan.defvjp(_forward, _backward)


def one_by_one(a, b, state):
    """T steps, that read and write every number once: on a CPU nothing is faster."""

    def step(h, token):
        h = Diagonal(*token)(h)
        return h, h

    in_time = functools.partial(_each, lambda a: jnp.moveaxis(a, 1, 0))
    _, h = lax.scan(step, state, in_time((a, b)))
    return _each(lambda h: jnp.moveaxis(h, 0, 1), h)


def side_by_side(a, b, state):
    """All chunks at once, then the states between them: 2 sqrt(T) steps, for accelerators."""
    T = jax.tree.leaves(b)[0].shape[1]
    tokens = cut((a, b), math.isqrt(T))  # [N, B, C, ...]
    tokens = Diagonal(*_each(lambda a: jnp.moveaxis(a, 2, 0), tokens))
    nothing = Diagonal(one_like(tokens.decay), _each(jnp.zeros_like, tokens.update))

    def step(before, token):
        after = before.then(token)
        return after, after

    whole, upto = lax.scan(step, _each(lambda a: a[0], nothing), tokens)
    _, entering = lax.scan(lambda h, chunk: (chunk(h), h), state, whole)
    joined = lambda h: jnp.moveaxis(h, (2, 1), (0, 1)).reshape(h.shape[2], -1, *h.shape[3:])
    return _each(lambda h: joined(h)[:, :T], upto(entering))
