"""One decay a head between the tokens of a chunk, in the vector memory of a TPU.

`kernels.head_decay` for one head, on arrays of two axes; here a state is turned:

    x, y    [C, K] queries and keys        v, d  [C, V] values and reads
    scores  [C, C]                         S, D  [V, K]

Gradients of log decays come as what each decay acts on, [C, 1]: see `documents.gate_gradient`.
"""

import jax.numpy as jnp

from seqlab.kernels.on_tpu.tiles import column, running
from seqlab.kernels.tiles import columns_by_columns, places, product, rows_by_rows


class HeadDecay:
    """log_decay, document [1, C]; document 0 is the one that enters"""

    def __init__(self, log_decay, document):
        i, j = places(log_decay.shape[1])
        same = column(document) == document
        self.sees, self.earlier, self.others = same & (i >= j), same & (i < j), i != j
        after_j = running(jnp.where(i > j, column(log_decay), 0))  # sums of the tokens in (j, i]
        masked = lambda seen, a: jnp.exp(jnp.where(seen, a, -jnp.inf))
        self.pairs = masked(self.sees, after_j)
        before = after_j[:, :1] + log_decay[:, :1]  # [C, 1]
        self.start = masked(column(document) == 0, before)
        self.end = masked(column(document) == document[:, -1:], column(after_j[-1:]))
        self.whole = masked(document[:, -1:] == 0, before[-1:])  # [1, 1]

    def scores(self, x, y):
        """x_i . y_j decayed from j to i, for j <= i in the same document"""
        return rows_by_rows(x, y) * self.pairs

    def scores_gradient(self, x, y, A, dA):
        """Cotangents of x and y, and what the decays of pairs act on."""
        across = (dA * self.pairs).astype(x.dtype)
        acts = jnp.where(self.others, A * dA, 0)
        gate = jnp.sum(acts, 1, keepdims=True) - column(jnp.sum(acts, 0, keepdims=True))
        return product(across, y), columns_by_columns(across, x), gate

    def read(self, x, S):
        """S x_i, decayed from the chunk's start"""
        return self.start * rows_by_rows(x, S.astype(x.dtype))

    def read_gradient(self, x, S, d):
        """Cotangents of x and S, and what the decays of reads act on."""
        d = (self.start * d).astype(x.dtype)
        dx = product(d, S.astype(x.dtype))
        return dx, columns_by_columns(d, x), jnp.sum(x * dx, 1, keepdims=True)

    def write(self, y, v):
        """sum_j v_j y_j^T, decayed to the chunk's end"""
        return columns_by_columns((self.end * v).astype(y.dtype), y)

    def write_gradient(self, y, v, D):
        """Cotangents of y and v, and what the decays of writes act on."""
        D = D.astype(y.dtype)
        dy = product((self.end * v).astype(y.dtype), D)
        return dy, self.end * rows_by_rows(y, D), jnp.sum(y * dy, 1, keepdims=True)

    def log_decay_gradient(self, pairs, writes, S, D):
        """The cotangent of the log decays [1, C], for the state S that enters and the cotangent D
        of the one that leaves."""
        above = lambda seen, a: jnp.sum(jnp.where(seen, a, 0), 0, keepdims=True)
        passes = jnp.sum(jnp.sum(S * D, 1, keepdims=True), 0, keepdims=True)
        return above(self.sees, pairs) + above(self.earlier, writes) + self.whole * passes
