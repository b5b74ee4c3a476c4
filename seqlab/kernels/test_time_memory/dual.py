"""What a window does, without weights of its own for any token: the dual form.

Gradients of all tokens in a chunk are taken at the same weights, and that of a matrix is an outer
product: of the row h_i that the matrix read for key i, and the gradient e_i at what it gave. So the
weights of token t are a sum, of the few matrices that enter the window, and of outer products:

    W_t = sum_m a_{t,m} M_m - sum_i P_{t,i} h_i^T e_i

and a query's row is multiplied with that sum as (q W_t) = sum_m a_{t,m} q M_m - ((q h^T) * P) e
(Sun et al., 2024, section 2.5, for sums alone; here with momentum and decay, whose products are P).
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.decay import BLOCK, pair_decay
from seqlab.kernels.documents import documents
from seqlab.kernels.precision import widen
from seqlab.kernels.test_time_memory.network import Weights, network


class Learned(NamedTuple):
    """The gradient of every layer for every key: of 1/2 |f(k) - v|^2, in two factors."""

    rows: tuple[jax.Array, ...]  # [B, H, C, d_in]
    errors: tuple[jax.Array, ...]  # [B, H, C, d_out]


class Sum(NamedTuple):
    """A matrix of each layer for each token; pairs is None where no gradient is in it."""

    terms: tuple  # of (coefficients [B, H, C, 1], matrices of the layers [B, H, d_in, d_out])
    pairs: jax.Array | None = None  # [B, H, C, C]

    def product(self, layer: int, h, learned: Learned | None = None):
        """Each token's row of h [B, H, C, d_in] times its own matrix."""
        y = _total(a * (h @ matrices[layer]) for a, matrices in self.terms)
        if learned is None or self.pairs is None:
            return y
        return y - (self.pairs * (h @ learned.rows[layer].mT)) @ learned.errors[layer]

    def last(self, learned: Learned, like: tuple) -> tuple:
        """The matrices of the last token, in the dtypes of `like`."""
        return tuple(self._last(n, learned).astype(a.dtype) for n, a in enumerate(like))

    def _last(self, layer: int, learned: Learned):
        kept = _total(a[:, :, -1:] * matrices[layer] for a, matrices in self.terms)
        if self.pairs is None:
            return kept
        written = self.pairs[:, :, -1, :, None] * learned.rows[layer]
        return kept - written.mT @ learned.errors[layer]


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


class Options(NamedTuple):
    activation: str
    decay_to: str = "init"
    read: str = "token"


def with_momentum(options: Options, tokens, reset, place, valid, weights: Weights, state):
    """A window of `test_time_memory`; the gates are rate, log_momentum and log_decay."""
    (v, q, k), (rate, log_momentum, log_decay) = _arranged(tokens, valid)
    (D, S, start), (enters, sees) = state, _seen(reset, valid)
    start = _where(_begins(place, valid), D, start)

    momentum, decay = (_between(g, sees) for g in (log_momentum, log_decay))
    decay = decay * valid[:, None, None]  # where there is no token, no momentum is added
    exact = jax.lax.Precision.HIGHEST
    both = jnp.matmul(decay, momentum, precision=exact)
    since = lambda g: jnp.einsum("bts,bhs->bht", sees.astype(g.dtype), g, precision=exact)
    momentum_in = enters * jnp.exp(since(log_momentum))[..., None]
    terms = (
        (enters * jnp.exp(since(log_decay))[..., None], D),
        (enters * jnp.matmul(decay, momentum_in, precision=exact), S),
    )
    if options.decay_to == "zero":
        terms += ((jnp.expm1(since(log_decay))[..., None], weights.layers),)
    step = 2 * rate[:, :, None]  # 2, for the gradient of a square
    now, velocity = Sum(terms, both * step), Sum(((momentum_in, S),), momentum * step)

    at_start = Sum(((enters, start),))
    learned = _learned(k, v, at_start, weights, options.activation)
    read = now if options.read == "token" else at_start
    y = _answer(q, read, learned, weights, options.activation)
    start = tuple(jnp.where(enters[:, :, -1:], a, 0) for a in start)
    return y, (now.last(learned, D), velocity.last(learned, S), start)


def within_chunks(options: Options, tokens, reset, place, valid, weights, state):
    """A window of `test_time_training`; the one gate is the rate."""
    (v, q, k), (rate,) = _arranged(tokens, valid)
    (weights, scale), (D, S), (enters, sees) = weights, state, _seen(reset, valid)
    first = _begins(place, valid)
    D = _where(first, tuple(d + scale[:, -1:, None] * s for d, s in zip(D, S, strict=True)), D)
    S = _where(first, tuple(s * 0 for s in S), S)

    scale = jnp.moveaxis(scale[:, place], 0, 1)[..., None]  # [B, H or 1, C, 1]
    pairs = rate[:, :, None] * sees[:, None]
    at_start, gathered = Sum(((enters, D),)), Sum(((enters, S),), pairs)
    now = Sum(((enters, D), (enters * scale, S)), scale * pairs)
    learned = _learned(k, v, at_start, weights, options.activation)
    y = _answer(q, now, learned, weights, options.activation)
    return y, (at_start.last(learned, D), gathered.last(learned, S))


def recall(options: Options, q, reset, place, valid, weights: Weights, state):
    """What a window of `test_time_memory` would answer with read="chunk", writing nothing."""
    (D, _, start), (enters, _) = state, _seen(reset, valid)
    at_start = Sum(((enters, _where(_begins(place, valid), D, start)),))
    q = jnp.swapaxes(widen(q), 1, 2)
    y = network(q, _plus(weights, at_start.product), weights, options.activation)
    return jnp.swapaxes(y, 1, 2)


def _arranged(tokens, valid):
    """v, q and k [B, H, C, ...], and gates [B, H, C], 0 where there is no token."""
    *vqk, gates = (jnp.swapaxes(widen(a), 1, 2) for a in tokens)
    gates = jnp.where(valid[:, None, :, None], gates, 0)
    return vqk, tuple(gates[..., n] for n in range(gates.shape[-1]))


def _seen(reset, valid):
    """Which tokens are of the document that enters, [B, 1, C, 1], and `documents.sees`."""
    docs = documents(reset & valid)
    return docs.enters[:, None, :, None], docs.sees


def _begins(place, valid):
    """[B], whether a chunk begins with the window."""
    return valid[:, 0] & (place[:, 0] == 0)


def _between(log_gate, sees):
    """The product of the gates after token j up to token i, [B, H, C, C]; 0 unless i sees j."""
    C = sees.shape[1]
    more = (0, -C % BLOCK)
    log_gate = jnp.pad(log_gate, [(0, 0), (0, 0), more])
    return pair_decay(log_gate, jnp.pad(sees, [(0, 0), more, more])).pairs[:, :, :C, :C]


def _where(rows, new: tuple, old: tuple) -> tuple:
    """rows [B] bool"""
    return tuple(jnp.where(rows[:, None, None, None], a, b) for a, b in zip(new, old, strict=True))


def _learned(k, v, at_start: Sum, weights: Weights, activation: str) -> Learned:
    product = _plus(weights, at_start.product)

    def loss(nudges):
        rows = []

        def nudged(layer, h):
            rows.append(h)
            return product(layer, h) + nudges[layer]

        error = network(k, nudged, weights, activation) - v
        return jnp.sum(jnp.square(error)) / 2, tuple(rows)

    nudges = tuple(0 * k[..., :1] + jnp.zeros(W.shape[-1], k.dtype) for W in weights.layers)
    errors, rows = jax.grad(loss, has_aux=True)(nudges)
    return Learned(rows, errors)


def _answer(q, now: Sum, learned: Learned, weights: Weights, activation: str):
    """f(q) [B, C, H, V] with each token's own weights."""
    product = _plus(weights, lambda layer, h: now.product(layer, h, learned))
    return jnp.swapaxes(network(q, product, weights, activation), 1, 2)


def _plus(weights: Weights, product: Callable) -> Callable:
    return lambda layer, h: h @ weights.layers[layer] + product(layer, h)
