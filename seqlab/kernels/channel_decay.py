"""What one decay a channel does between the tokens of a chunk and the states at its ends.

It acts inside the products over channels. A decay between two tokens splits into a factor for the
row and one for the column only where both stay <= 1. So between blocks of 16 it is split at the
block borders, in three factors that are each <= 1, and inside a block the sum over channels is
written out: safe at any strength (Yang et al., 2023, section 4.3, use the same two levels).

Methods and layouts are those of `HeadDecay`, with every head a group of its own. Letters: m, n
blocks.
"""

import jax.numpy as jnp

from seqlab.kernels.decay import BLOCK, decay
from seqlab.kernels.documents import documents, gate_gradient
from seqlab.kernels.precision import dot


class ChannelDecay:
    """log_decay [B, C, H, K], reset [B, C]; C a multiple of 16"""

    def __init__(self, log_decay, reset, groups: int, rows: int, columns: int):
        B, C, H, K = log_decay.shape
        self.repeat, self.rows, self.columns = H // groups, rows, columns
        self.documents = docs = documents(reset)
        sums = decay(jnp.moveaxis(log_decay, 2, 1).reshape(B * H, C, K))
        split = lambda a: a.reshape(B, H, *a.shape[1:])
        masked = lambda seen, x: jnp.exp(jnp.where(seen[:, None, :, None], split(x), -jnp.inf))
        self.start = jnp.tile(masked(docs.enters, sums.before), (rows, 1))  # [B, H, X C, K]
        self.end = jnp.tile(masked(docs.leaves, sums.after), (columns, 1))  # [B, H, Y C, K]
        whole = jnp.where(docs.passes[:, None, None], jnp.exp(split(sums.whole)), 0)
        self.whole = whole[:, :, None, :, None]  # [B, H, 1, K, 1]
        self.in_row = split(jnp.exp(sums.prefix))[:, :, None]  # [B, H, 1, M, 16, K]
        self.out_column = split(jnp.exp(sums.suffix))[:, :, None]
        earlier = jnp.tri(sums.between.shape[1], k=-1, dtype=bool)[..., None]
        self.between = split(jnp.exp(jnp.where(earlier, sums.between, -jnp.inf)))
        causal = jnp.tri(BLOCK, dtype=bool)[..., None]
        self.within = split(jnp.exp(jnp.where(causal, sums.within, -jnp.inf)))

    def keys(self, *kinds):
        """[B, C, G, K] each -> [B, H, X C, K]"""
        return jnp.repeat(jnp.concatenate([jnp.moveaxis(a, 2, 1) for a in kinds], 2), self.repeat, 1)

    def of_keys(self, a, like):
        """[B, H, C, K] -> [B, C, G, K]"""
        B, C, G, K = like.shape
        return jnp.moveaxis(a.reshape(B, G, -1, C, K).sum(2), 1, 2)

    def values(self, a):
        """[B, C, H, V] -> [B, H, 1, C, V]"""
        return jnp.moveaxis(a, 2, 1)[:, :, None]

    def of_values(self, a):
        return jnp.moveaxis(a[:, :, 0], 1, 2)

    def state(self, S):
        """[B, H, K, V] -> [B, H, 1, K, V]"""
        return S[:, :, None]

    def of_state(self, S):
        return S[:, :, 0]

    def scores(self, x, y):
        """sum_k x_ik y_jk decay_ijk, for j <= i in the same document"""
        narrow, x, y = x.dtype, self._blocks(x, self.rows), self._blocks(y, self.columns)
        rows, columns = self._to_border(x).astype(narrow), (y * self.out_column).astype(narrow)
        A = dot("bhxmnik,bhynjk->bhxmiynj", rows, columns)
        own = jnp.einsum("bhxmik,bhymjk,bhmijk->bhxmiyj", x, y, self.within)
        same = jnp.eye(A.shape[3], dtype=own.dtype)[:, None, None, :, None]
        A += own[:, :, :, :, :, :, None] * same
        A = A.reshape(*A.shape[:2], 1, self.rows * self._size, -1)
        return jnp.where(self._sees, A, 0)

    def scores_gradient(self, x, y, A, dA):
        """Cotangents of rows and columns, and what the decays of pairs act on."""
        narrow, shapes = x.dtype, (x.shape, y.shape)
        x, y = self._blocks(x, self.rows), self._blocks(y, self.columns)
        X, M, Y = self.rows, x.shape[3], self.columns
        dA = jnp.where(self._sees, dA, 0)[:, :, 0]
        dA = dA.reshape(*dA.shape[:2], X, M, BLOCK, Y, M, BLOCK)
        few = dA.astype(narrow)
        dx = dot("bhxmiynj,bhynjk->bhxmnik", few, (y * self.out_column).astype(narrow))
        dx = self.in_row * jnp.sum(dx * self.between[:, :, None, :, :, None], 4)
        dy = dot("bhxmiynj,bhxmnik->bhynjk", few, self._to_border(x).astype(narrow))
        dy = self.out_column * dy
        block = jnp.einsum("bhxmiymj->bhxmiyj", dA)
        near = block * (1 - jnp.eye(BLOCK, dtype=dA.dtype))[:, None]
        dx += jnp.einsum("bhxmiyj,bhymjk,bhmijk->bhxmik", near, y, self.within)
        dy += jnp.einsum("bhxmiyj,bhxmik,bhmijk->bhymjk", near, x, self.within)
        acts = jnp.sum(x * dx, 2) - jnp.sum(y * dy, 2)
        acts = jnp.moveaxis(acts.reshape(*acts.shape[:2], -1, acts.shape[-1]), 1, 2)
        own = jnp.einsum("bhxmiyi->bhxymi", block)
        dx += jnp.einsum("bhxymi,bhymik->bhxmik", own, y)
        dy += jnp.einsum("bhxymi,bhxmik->bhymik", own, x)
        return dx.reshape(shapes[0]), dy.reshape(shapes[1]), acts

    def read(self, x, S):
        """S^T x_i, decayed from the chunk's start"""
        few = lambda a: a.astype(x.dtype)
        return dot("bhik,bhrkv->bhriv", few(x * self.start), few(S))

    def read_gradient(self, x, S, d):
        """Cotangents of rows and state, and what the decays of reads act on."""
        few = lambda a: a.astype(x.dtype)
        dx = self.start * dot("bhriv,bhrkv->bhik", few(d), few(S))
        dS = dot("bhik,bhriv->bhrkv", few(x * self.start), few(d))
        return dx, dS, self._gate(x * dx)

    def write(self, y, v):
        """sum_j y_j v_j^T, decayed to the chunk's end"""
        few = lambda a: a.astype(y.dtype)
        return dot("bhjk,bhrjv->bhrkv", few(y * self.end), few(v))

    def write_gradient(self, y, v, D):
        """Cotangents of columns and values, and what the decays of writes act on."""
        few = lambda a: a.astype(y.dtype)
        dy = self.end * dot("bhrjv,bhrkv->bhjk", few(v), few(D))
        dv = dot("bhjk,bhrkv->bhrjv", few(y * self.end), few(D))
        return dy, dv, self._gate(y * dy)

    def log_decay_gradient(self, pairs, writes, S, D):
        """The cotangent of the log decays [B, C, H, K], for the state S that enters and the
        cotangent D of the one that leaves."""
        passes = jnp.sum(self.whole * S * D, (2, -1))
        return gate_gradient(self.documents, pairs, writes, passes)

    def _to_border(self, x):
        """Rows with their decay from the border of each block before: [B, H, X, M, N, 16, K]"""
        return (x * self.in_row)[:, :, :, :, None] * self.between[:, :, None, :, :, None]

    def _blocks(self, a, kinds):
        """[B, H, X C, K] -> [B, H, X, M, 16, K]"""
        return a.reshape(*a.shape[:2], kinds, -1, BLOCK, a.shape[-1])

    def _gate(self, a):
        """[B, H, X C, K] -> [B, C, H, K], summed over the kinds"""
        a = a.reshape(*a.shape[:2], -1, self._size, a.shape[-1]).sum(2)
        return jnp.moveaxis(a, 1, 2)

    @property
    def _sees(self):
        return jnp.tile(self.documents.sees, (self.rows, self.columns))[:, None, None]

    @property
    def _size(self):
        return self.documents.sees.shape[1]
