"""One decay a head (Mamba-2, RetNet, mLSTM): scores are q k^T times a matrix of decays.

Keys and queries shared by the heads of a group are multiplied once for the group: decays act on
scores, values and outputs, never on them. Inside, heads stand before tokens, so that every product
is a batch of plain ones. Letters: g group, r head within the group.
"""

import jax.numpy as jnp

from seqlab.kernels.decay import pair_decay
from seqlab.kernels.documents import documents, gate_gradient
from seqlab.kernels.precision import dot, widen
from seqlab.parallel.transitions import Diagonal


def forward(q, k, v, log_decay, reset, S):
    """One chunk: q, k [B, C, G, K], v [B, C, H, V], log_decay [B, C, H, 1] -> y, the next S"""
    c = _Chunk(q, k, v, log_decay, reset)
    S = c.grouped(S)
    y = dot("bgrij,bgrjv->bgriv", c.scores().astype(v.dtype), c.v)
    y += c.from_start * dot("bgik,bgrkv->bgriv", c.q, S.astype(q.dtype))
    after = c.decay * S + c.update()
    return c.by_token(y), c.ungrouped(after)


def transition(q, k, v, log_decay, reset) -> Diagonal:
    c = _Chunk(q, k, v, log_decay, reset)
    return Diagonal(c.ungrouped(c.decay), c.ungrouped(c.update()))


def backward(q, k, v, log_decay, reset, S, dy, D):
    """Cotangents of q, k, v, log_decay and S from those of y and the next state."""
    c = _Chunk(q, k, v, log_decay, reset)
    S, D = c.grouped(S), c.grouped(D)
    S_n, D_n = S.astype(q.dtype), D.astype(q.dtype)
    dy = c.by_head(dy)
    dy_n = dy.astype(v.dtype)
    d_scores = dot("bgriv,bgrjv->bgrij", dy_n, c.v)
    scores = c.scores()
    d_pairs = jnp.sum(d_scores * c.pairs, 2).astype(q.dtype)  # [B, G, C, C]
    dq_start = c.from_start * dot("bgriv,bgrkv->bgrik", dy_n, S_n)
    dq = dot("bgij,bgjk->bgik", d_pairs, c.k) + jnp.sum(dq_start, 2)
    dk = dot("bgij,bgik->bgjk", d_pairs, c.q) + dot("bgrjv,bgrkv->bgjk", c.v_end, D_n)
    dv_end = c.to_end * dot("bgjk,bgrkv->bgrjv", c.k, D_n)
    dv = dot("bgrij,bgriv->bgrjv", scores.astype(v.dtype), dy_n) + dv_end
    weighted = jnp.where(jnp.eye(q.shape[1], dtype=bool), 0, d_scores * scores)
    reads = jnp.sum(widen(c.q)[:, :, None] * dq_start, -1)
    pairs = jnp.sum(weighted, -1) - jnp.sum(weighted, -2) + reads
    d_log_decay = gate_gradient(
        c.documents,
        pairs=c.by_token(pairs),
        writes=c.by_token(jnp.sum(c.v * dv_end, -1)),
        passes=c.ungrouped(jnp.sum(c.decay * S * D, (-2, -1))),
    )
    D = c.decay * D + dot("bgik,bgriv->bgrkv", c.q, (c.from_start * dy).astype(q.dtype))
    tokens_first = lambda a: jnp.swapaxes(a, 1, 2)
    dq, dk = tokens_first(dq), tokens_first(dk)
    return dq, dk, c.by_token(dv), d_log_decay[..., None], None, c.ungrouped(D)


class _Chunk:
    """What the forward and the backward pass of one chunk both need."""

    def __init__(self, q, k, v, log_decay, reset):
        self.groups = q.shape[2]
        self.q, self.k = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)  # [B, G, C, K]
        self.v = self.by_head(v)  # [B, G, R, C, V]
        self.documents = docs = documents(reset)
        sums = pair_decay(jnp.swapaxes(log_decay[..., 0], 1, 2), docs.sees)
        masked = lambda seen, x: jnp.exp(jnp.where(seen[:, None], x, -jnp.inf))
        self.pairs = self.grouped(sums.pairs)  # [B, G, R, C, C]
        self.from_start = self.grouped(masked(docs.enters, sums.before)[..., None])
        self.to_end = self.grouped(masked(docs.leaves, sums.after)[..., None])
        passes = jnp.where(docs.passes[:, None], jnp.exp(sums.whole), 0)
        self.decay = self.grouped(passes[..., None, None])
        self.v_end = (self.to_end * self.v).astype(k.dtype)

    def scores(self):
        return dot("bgik,bgjk->bgij", self.q, self.k)[:, :, None] * self.pairs

    def update(self):
        """What the chunk adds to the state that leaves."""
        return dot("bgjk,bgrjv->bgrkv", self.k, self.v_end)

    def by_head(self, a):
        """[B, C, H, ...] -> [B, G, R, C, ...]"""
        return self.grouped(jnp.swapaxes(a, 1, 2))

    def by_token(self, a):
        """[B, G, R, C, ...] -> [B, C, H, ...]"""
        return jnp.swapaxes(self.ungrouped(a), 1, 2)

    def grouped(self, S):
        """[B, H, ...] -> [B, G, R, ...]"""
        return S.reshape(S.shape[0], self.groups, -1, *S.shape[2:])

    def ungrouped(self, S):
        """[B, G, R, ...] -> [B, H, ...]"""
        return S.reshape(S.shape[0], -1, *S.shape[3:])
