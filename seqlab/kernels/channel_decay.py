"""What one decay a channel does between the tokens of a chunk and the states at its ends.

It acts inside the products over channels: see `halving`. Methods and layouts are those of
`HeadDecay`, with every head a group of its own.
"""

import jax.numpy as jnp

from seqlab.kernels import halving
from seqlab.kernels.documents import documents, gate_gradient
from seqlab.kernels.precision import dot, total, widen


class ChannelDecay:
    """log_decay [B, C, H, K], reset [B, C]; C a power of two"""

    def __init__(self, log_decay, reset, groups: int, rows: int, columns: int):
        self.repeat, self.rows, self.columns = log_decay.shape[2] // groups, rows, columns
        self.documents = docs = documents(reset)
        self.sums = sums = halving.decays(jnp.swapaxes(log_decay, 1, 2))
        masked = lambda seen, x: jnp.where(seen[:, None, :, None], x, 0)
        self.start = jnp.tile(masked(docs.enters, sums.before), (rows, 1))  # [B, H, X C, K]
        self.end = jnp.tile(masked(docs.leaves, sums.after), (columns, 1))  # [B, H, Y C, K]
        whole = jnp.where(docs.passes[:, None, None], sums.whole, 0)
        self.whole = whole[:, :, None, :, None]  # [B, H, 1, K, 1]

    def keys(self, *kinds):
        """[B, C, G, K] each -> [B, H, X C, K]"""
        return jnp.repeat(
            jnp.concatenate([jnp.swapaxes(a, 1, 2) for a in kinds], 2), self.repeat, 1
        )

    def of_keys(self, a, like):
        """[B, H, C, K] -> [B, C, G, K]"""
        B, C, G, K = like.shape
        return jnp.swapaxes(a.reshape(B, G, -1, C, K).sum(2), 1, 2)

    def values(self, a):
        """[B, C, H, V] -> [B, H, 1, C, V]"""
        return jnp.swapaxes(a, 1, 2)[:, :, None]

    def of_values(self, a):
        return jnp.swapaxes(a[:, :, 0], 1, 2)

    def state(self, S):
        """[B, H, K, V] -> [B, H, 1, K, V]"""
        return S[:, :, None]

    def of_state(self, S):
        return S[:, :, 0]

    def scores(self, x, y):
        """sum_k x_ik y_jk decay_ijk, for j <= i in the same document"""
        columns = self._kinds(y, self.columns)
        one = lambda x, y: halving.scores(self.sums, widen(x), widen(y), x.dtype)
        A = [jnp.concatenate([one(x, y) for y in columns], 3) for x in self._kinds(x, self.rows)]
        return jnp.where(self._sees, jnp.concatenate(A, 2), 0)[:, :, None]

    def scores_gradient(self, x, y, A, dA):
        """Cotangents of rows and columns, and what the decays of pairs act on."""
        few, dA = x.dtype, jnp.where(self._sees, dA[:, :, 0], 0)
        rows, columns = self._kinds(widen(x), self.rows), self._kinds(widen(y), self.columns)
        dx, dy = [[jnp.zeros_like(a) for a in kinds] for kinds in (rows, columns)]
        acts = jnp.zeros_like(rows[0])
        for i, row in enumerate(jnp.split(dA, len(rows), 2)):
            for j, d in enumerate(jnp.split(row, len(columns), 3)):
                x, y, own = rows[i], columns[j], jnp.einsum("bhii->bhi", d)[..., None]
                to_x, to_y = halving.products(self.sums, d, x, y, few)
                acts += x * to_x - y * to_y
                dx[i], dy[j] = dx[i] + to_x + own * y, dy[j] + to_y + own * x
        return jnp.concatenate(dx, 2), jnp.concatenate(dy, 2), self._gate(acts)

    def read(self, x, S):
        """S^T x_i, decayed from the chunk's start"""
        few = lambda a: a.astype(x.dtype)
        return dot("bhik,bhkv->bhiv", few(x * self.start), few(S[:, :, 0]))[:, :, None]

    def read_gradient(self, x, S, d):
        """Cotangents of rows and state, and what the decays of reads act on."""
        few, d, S = lambda a: a.astype(x.dtype), d[:, :, 0], S[:, :, 0]
        dx = self.start * dot("bhiv,bhkv->bhik", few(d), few(S))
        dS = dot("bhik,bhiv->bhkv", few(x * self.start), few(d))
        return dx, dS[:, :, None], self._gate(x * dx)

    def write(self, y, v):
        """sum_j y_j v_j^T, decayed to the chunk's end"""
        few = lambda a: a.astype(y.dtype)
        return dot("bhjk,bhjv->bhkv", few(y * self.end), few(v[:, :, 0]))[:, :, None]

    def write_gradient(self, y, v, D):
        """Cotangents of columns and values, and what the decays of writes act on."""
        few, v, D = lambda a: a.astype(y.dtype), v[:, :, 0], D[:, :, 0]
        dy = self.end * dot("bhjv,bhkv->bhjk", few(v), few(D))
        dv = dot("bhjk,bhkv->bhjv", few(y * self.end), few(D))
        return dy, dv[:, :, None], self._gate(y * dy)

    def log_decay_gradient(self, pairs, writes, S, D):
        """The cotangent of the log decays [B, C, H, K], for the state S that enters and the
        cotangent D of the one that leaves."""
        passes = jnp.sum(total(self.whole * S * D), 2)
        return gate_gradient(self.documents, pairs, writes, passes)

    def _kinds(self, a, n: int):
        """[B, H, X C, K] -> X of [B, H, C, K]"""
        return jnp.split(a, n, 2)

    def _gate(self, a):
        """[B, H, X C, K] -> [B, C, H, K], summed over the kinds"""
        a = a.reshape(*a.shape[:2], -1, self.documents.sees.shape[1], a.shape[-1])
        return jnp.swapaxes(a.sum(2), 1, 2)

    @property
    def _sees(self):
        return jnp.tile(self.documents.sees, (self.rows, self.columns))[:, None]
