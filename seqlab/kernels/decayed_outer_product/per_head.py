"""One decay a head (Mamba-2, RetNet, mLSTM): scores are q k^T times a matrix of decays.

Keys and queries shared by the heads of a group are multiplied once for the group: decays act on
scores, values and outputs, never on them. Letters: g group, r head within the group.
"""

import jax.numpy as jnp

from seqlab.kernels.decay import BLOCK, decay
from seqlab.kernels.documents import documents, gate_gradient
from seqlab.kernels.precision import dot
from seqlab.parallel.transitions import Diagonal


def forward(q, k, v, log_decay, reset, S):
    """One chunk: q, k [B, C, G, K], v [B, C, H, V], log_decay [B, C, H, 1] -> y, the next S"""
    c = _Chunk(q, k, v, log_decay, reset)
    S = c.grouped_state(S)
    y = dot("bgrij,bjgrv->bigrv", c.scores.astype(v.dtype), c.v)
    y += c.from_start * dot("bigk,bgrkv->bigrv", q, S.astype(q.dtype))
    after = c.decay * S + dot("bjgk,bjgrv->bgrkv", k, (c.v * c.to_end).astype(k.dtype))
    return y.reshape(v.shape), c.ungrouped_state(after)


def transition(q, k, v, log_decay, reset) -> Diagonal:
    c = _Chunk(q, k, v, log_decay, reset)
    update = dot("bjgk,bjgrv->bgrkv", k, (c.v * c.to_end).astype(k.dtype))
    return Diagonal(c.ungrouped_state(c.decay), c.ungrouped_state(update))


def backward(q, k, v, log_decay, reset, S, dy, D):
    """Cotangents of q, k, v, log_decay and S from those of y and the next state."""
    c = _Chunk(q, k, v, log_decay, reset)
    S, D = c.grouped_state(S), c.grouped_state(D)
    dy = c.grouped(dy)
    dy_start, v_end = (c.from_start * dy).astype(q.dtype), (c.to_end * c.v).astype(k.dtype)
    d_scores = dot("bigrv,bjgrv->bgrij", dy.astype(v.dtype), c.v)
    d_pairs = jnp.sum(d_scores * c.pair_decay, 2).astype(q.dtype)  # [B, G, C, C]
    dq = dot("bgij,bjgk->bigk", d_pairs, k) + dot("bigrv,bgrkv->bigk", dy_start, S.astype(q.dtype))
    dk = dot("bgij,bigk->bjgk", d_pairs, q) + dot("bjgrv,bgrkv->bjgk", v_end, D.astype(k.dtype))
    dv_end = c.to_end * dot("bjgk,bgrkv->bjgrv", k, D.astype(k.dtype))
    dv = dot("bgrij,bigrv->bjgrv", c.scores.astype(v.dtype), dy.astype(v.dtype)) + dv_end
    read = dot("bigk,bgrkv->bigrv", q, S.astype(q.dtype)) * c.from_start
    weighted = jnp.where(jnp.eye(q.shape[1], dtype=bool), 0, d_scores * c.scores)
    pairs = jnp.moveaxis(jnp.sum(weighted, -1) - jnp.sum(weighted, -2), -1, 1)  # [B, C, G, R]
    d_log_decay = gate_gradient(
        c.documents,
        pairs=pairs + jnp.sum(dy * read, -1),
        writes=jnp.sum(c.v * dv_end, -1),
        passes=jnp.sum(c.decay * S * D, (-2, -1)),
    )
    D = c.decay * D + dot("bigk,bigrv->bgrkv", q, dy_start)
    D = c.ungrouped_state(D)
    return dq, dk, dv.reshape(v.shape), d_log_decay.reshape(log_decay.shape), None, D


class _Chunk:
    """What the forward and the backward pass of one chunk both need."""

    def __init__(self, q, k, v, log_decay, reset):
        self.groups = q.shape[2]
        self.v = self.grouped(v)
        self.documents = docs = documents(reset)
        sums = decay(log_decay[..., 0])
        self.pair_decay = self._pair_decay(sums)  # [B, G, R, C, C]
        self.scores = dot("bigk,bjgk->bgij", q, k)[:, :, None] * self.pair_decay
        masked = lambda seen, x: jnp.exp(jnp.where(seen[..., None], x, -jnp.inf))[..., None]
        self.from_start = self.grouped(masked(docs.enters, sums.before))  # [B, C, G, R, 1]
        self.to_end = self.grouped(masked(docs.leaves, sums.after))
        passes = jnp.where(docs.passes[:, None], jnp.exp(sums.whole), 0)
        self.decay = self.grouped_state(passes[..., None, None])

    def _pair_decay(self, sums):
        M = sums.between.shape[1]
        apart = sums.prefix[:, :, :, None, None] + sums.suffix[:, None, None]
        apart += sums.between[:, :, None, :, None]  # [B, M, 16, N, 16, H]
        same_block = jnp.eye(M, dtype=bool)[:, None, :, None, None]
        pairs = jnp.where(same_block, sums.within[:, :, :, None], apart)
        pairs = jnp.moveaxis(pairs.reshape(len(pairs), M * BLOCK, M * BLOCK, -1), -1, 1)
        pairs = jnp.exp(jnp.where(self.documents.sees[:, None], pairs, -jnp.inf))
        return self.grouped_state(pairs)

    def grouped(self, a):
        """[B, C, H, ...] -> [B, C, G, R, ...]"""
        return a.reshape(*a.shape[:2], self.groups, -1, *a.shape[3:])

    def grouped_state(self, S):
        """[B, H, K, V] -> [B, G, R, K, V]"""
        return S.reshape(S.shape[0], self.groups, -1, *S.shape[2:])

    def ungrouped_state(self, S):
        return S.reshape(S.shape[0], -1, *S.shape[3:])
