"""What one decay a head does between the tokens of a chunk and the states at its ends.

It multiplies scores, outputs and values, never keys; so what the heads of a group share is
multiplied once for the group. `ChannelDecay` does the same with one decay a channel. Both work in
these layouts, with G groups of R heads; there may be several kinds of rows (queries) and columns
(keys), X and Y times C of them, one kind after the other:

    rows    [B, G, X C, K]       columns  [B, G, Y C, K]       scores  [B, G, R, X C, Y C]
    values  [B, G, R, Y C, V]    reads    [B, G, R, X C, V]    state   [B, G, R, K, V]

Gradients of log decays come as what each decay acts on: see `documents.gate_gradient`.
"""

import jax.numpy as jnp

from seqlab.kernels.decay import pair_decay
from seqlab.kernels.documents import documents, gate_gradient
from seqlab.kernels.precision import dot, total


class HeadDecay:
    """log_decay [B, C, H, 1], reset [B, C]; C a multiple of 16"""

    def __init__(self, log_decay, reset, groups: int, rows: int, columns: int):
        self.groups, self.size = groups, reset.shape[1]
        self.documents = docs = documents(reset)
        sums = pair_decay(jnp.swapaxes(log_decay[..., 0], 1, 2), docs.sees)
        masked = lambda seen, x: jnp.exp(jnp.where(seen[:, None], x, -jnp.inf))
        tokens = lambda a, n: jnp.tile(self._split(a), n)[..., None]
        self.start = tokens(masked(docs.enters, sums.before), rows)  # [B, G, R, X C, 1]
        self.end = tokens(masked(docs.leaves, sums.after), columns)  # [B, G, R, Y C, 1]
        self.pairs = jnp.tile(self._split(sums.pairs), (rows, columns))
        self.others = jnp.tile(1 - jnp.eye(self.size, dtype=log_decay.dtype), (rows, columns))
        whole = jnp.where(docs.passes[:, None], jnp.exp(sums.whole), 0)
        self.whole = self._split(whole)[..., None, None]  # [B, G, R, 1, 1]

    def keys(self, *kinds):
        """[B, C, G, K] each -> [B, G, X C, K]"""
        return jnp.concatenate([jnp.swapaxes(a, 1, 2) for a in kinds], 2)

    def of_keys(self, a, like):
        """[B, G, C, K] -> [B, C, G, K]"""
        return jnp.swapaxes(a, 1, 2)

    def values(self, a):
        """[B, C, H, V] -> [B, G, R, C, V]"""
        return self._split(jnp.swapaxes(a, 1, 2))

    def of_values(self, a):
        return jnp.swapaxes(self._joined(a), 1, 2)

    def state(self, S):
        """[B, H, K, V] -> [B, G, R, K, V]"""
        return self._split(S)

    def of_state(self, S):
        return self._joined(S)

    def scores(self, x, y):
        """x_i . y_j decayed from j to i, for j <= i in the same document"""
        return dot("bgik,bgjk->bgij", x, y)[:, :, None] * self.pairs

    def scores_gradient(self, x, y, A, dA):
        """Cotangents of rows and columns, and what the decays of pairs act on."""
        by_group = jnp.sum(dA * self.pairs, 2).astype(x.dtype)
        dx, dy = dot("bgij,bgjk->bgik", by_group, y), dot("bgij,bgik->bgjk", by_group, x)
        acts = A * dA * self.others
        return dx, dy, self._gate(total(acts)) - self._gate(acts.sum(-2))

    def read(self, x, S):
        """S^T x_i, decayed from the chunk's start"""
        return self.start * dot("bgrik,bgrkv->bgriv", self._each(x), S.astype(x.dtype))

    def read_gradient(self, x, S, d):
        """Cotangents of rows and state, and what the decays of reads act on."""
        d = (self.start * d).astype(x.dtype)
        dx = dot("bgriv,bgrkv->bgrik", d, S.astype(x.dtype))
        dS = dot("bgrik,bgriv->bgrkv", self._each(x), d)
        return dx.sum(2), dS, self._gate(total(x[:, :, None] * dx))

    def write(self, y, v):
        """sum_j y_j v_j^T, decayed to the chunk's end"""
        return dot("bgrjk,bgrjv->bgrkv", self._each(y), (self.end * v).astype(y.dtype))

    def write_gradient(self, y, v, D):
        """Cotangents of columns and values, and what the decays of writes act on."""
        D = D.astype(y.dtype)
        dy = dot("bgrjv,bgrkv->bgrjk", (self.end * v).astype(y.dtype), D)
        dv = self.end * dot("bgrjk,bgrkv->bgrjv", self._each(y), D)
        return dy.sum(2), dv, self._gate(total(y[:, :, None] * dy))

    def log_decay_gradient(self, pairs, writes, S, D):
        """The cotangent of the log decays [B, C, H, 1], for the state S that enters and the
        cotangent D of the one that leaves."""
        passes = self._joined(total(total(self.whole * S * D)))[..., None]
        return gate_gradient(self.documents, pairs, writes, passes)

    def _gate(self, a):
        """[B, G, R, X C] -> [B, C, H, 1], summed over the kinds"""
        a = self._joined(a)
        a = a.reshape(*a.shape[:2], -1, self.size).sum(2)
        return jnp.swapaxes(a, 1, 2)[..., None]

    def _each(self, a):
        """[B, G, X C, K] -> [B, G, R, X C, K]"""
        shape = *a.shape[:2], self.whole.shape[2], *a.shape[2:]
        return jnp.broadcast_to(a[:, :, None], shape)

    def _split(self, a):
        """[B, H, ...] -> [B, G, R, ...]"""
        return a.reshape(a.shape[0], self.groups, -1, *a.shape[2:])

    def _joined(self, a):
        """[B, G, R, ...] -> [B, H, ...]"""
        return a.reshape(a.shape[0], -1, *a.shape[3:])
