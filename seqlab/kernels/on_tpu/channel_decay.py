"""`HeadDecay` with one decay a channel: the same pieces, [C, K] where it has a number a token.

The decay of a pair is split at the first border of halved chunks that comes between the two (see
`kernels.halving`). Here scores of every border are one product of the whole chunk, of which the
pairs that it parts are kept: more arithmetic, and no piece smaller than the matrix unit.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels.on_tpu.tiles import column
from seqlab.kernels.precision import widen
from seqlab.kernels.tiles import columns_by_columns, places, product, rows_by_rows


class ChannelDecay:
    """log_decay [C, K], document [1, C]; C a power of two"""

    def __init__(self, log_decay, document):
        self.i, self.j = places(log_decay.shape[0])
        same = column(document) == document
        self.sees, self.later = same & (self.i >= self.j), same & (self.i > self.j)
        self._halve(log_decay)
        self.start = jnp.where(column(document) == 0, self.before, 0)
        self.end = jnp.where(column(document) == document[:, -1:], self.after, 0)
        self.whole = jnp.where(document[:, -1:] == 0, self.before[-1:], 0)  # [1, K]

    def _halve(self, log_decay):
        """Decays inside blocks of 1, 2, 4, ... tokens, each from those of its halves: up to a
        token, after a token, and of the whole block."""
        size, place = log_decay.shape[0], lax.broadcasted_iota(jnp.int32, log_decay.shape, 0)
        upto = whole = jnp.exp(log_decay)
        after = jnp.ones_like(upto)
        self.borders = []  # (s, decay up to i from the middle, decay after j to the middle)
        s = 1
        while s < size:
            self.borders.append((s, upto, after))
            right = place & s != 0
            left_whole, right_whole = pltpu.roll(whole, s, 0), pltpu.roll(whole, size - s, 0)
            upto = jnp.where(right, left_whole * upto, upto)
            after = jnp.where(right, after, right_whole * after)
            whole = whole * jnp.where(right, left_whole, right_whole)
            s *= 2
        self.before, self.after = upto, after

    def _parts(self, s):
        """The pairs that the borders in blocks of 2 s tokens part: [C, C]"""
        return (self.i > self.j) & ((self.i ^ self.j) // s == 1)

    def scores(self, x, y):
        """sum_k x_ik y_jk decay_ijk, for j <= i in the same document"""
        own = jnp.sum(widen(x) * widen(y), 1, keepdims=True)
        A = jnp.where(self.i == self.j, own, 0)
        for s, upto, after in self.borders:
            across = rows_by_rows((x * upto).astype(x.dtype), (y * after).astype(x.dtype))
            A += jnp.where(self._parts(s), across, 0)
        return jnp.where(self.sees, A, 0)

    def scores_gradient(self, x, y, A, dA):
        """Cotangents of x and y, and what the decays of pairs act on."""
        dA, few = jnp.where(self.sees, dA, 0), x.dtype
        own = jnp.sum(jnp.where(self.i == self.j, dA, 0), 1, keepdims=True)
        to_x, to_y = jnp.zeros_like(self.start), jnp.zeros_like(self.start)
        for s, upto, after in self.borders:
            across = jnp.where(self._parts(s), dA, 0).astype(few)
            to_x += upto * product(across, (y * after).astype(few))
            to_y += after * columns_by_columns(across, (x * upto).astype(few))
        return to_x + own * y, to_y + own * x, x * to_x - y * to_y

    def read(self, x, S):
        """S x_i, decayed from the chunk's start"""
        return rows_by_rows((x * self.start).astype(x.dtype), S.astype(x.dtype))

    def read_gradient(self, x, S, d):
        """Cotangents of x and S, and what the decays of reads act on."""
        d = d.astype(x.dtype)
        dx = self.start * product(d, S.astype(x.dtype))
        return dx, columns_by_columns(d, (x * self.start).astype(x.dtype)), x * dx

    def write(self, y, v):
        """sum_j v_j y_j^T, decayed to the chunk's end"""
        return columns_by_columns(v.astype(y.dtype), (y * self.end).astype(y.dtype))

    def write_gradient(self, y, v, D):
        """Cotangents of y and v, and what the decays of writes act on."""
        D = D.astype(y.dtype)
        dy = self.end * product(v.astype(y.dtype), D)
        return dy, rows_by_rows((y * self.end).astype(y.dtype), D), y * dy

    def log_decay_gradient(self, pairs, writes, S, D):
        """The cotangent of the log decays [C, K], for the state S that enters and the cotangent D
        of the one that leaves."""
        ones = lambda seen: jnp.where(seen, jnp.ones((), pairs.dtype), 0)
        passes = self.whole * jnp.sum(S * D, 0, keepdims=True)
        collected = columns_by_columns(ones(self.sees), pairs) + product(ones(self.later), writes)
        return collected + passes
