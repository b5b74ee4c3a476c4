"""One decay a channel (GLA, HGRN2): decays act inside the products over channels.

A decay between two tokens splits into a factor for the query and one for the key only where both
stay <= 1. So between blocks of 16 it is split at the block borders, in three factors that are each
<= 1, and inside a block the sum over channels is written out. That is safe at any gate strength
(Yang et al., 2023, section 4.3, use the same two levels).
"""

import jax.numpy as jnp

from seqlab.kernels.decay import BLOCK, decay
from seqlab.kernels.documents import documents, gate_gradient
from seqlab.kernels.precision import dot
from seqlab.parallel.transitions import Diagonal


def forward(q, k, v, log_decay, reset, S):
    """One chunk: q, k [B, C, G, K], v [B, C, H, V], log_decay [B, C, H, K] -> y, the next S"""
    c = _Chunk(q, k, log_decay, reset)
    y = dot("bhij,bjhv->bihv", c.scores().astype(v.dtype), v)
    y += dot("bihk,bhkv->bihv", c.q_start.astype(v.dtype), S.astype(v.dtype))
    return y, c.decay * S + dot("bjhk,bjhv->bhkv", c.k_end.astype(v.dtype), v)


def transition(q, k, v, log_decay, reset) -> Diagonal:
    c = _Chunk(q, k, log_decay, reset)
    return Diagonal(c.decay, dot("bjhk,bjhv->bhkv", c.k_end.astype(v.dtype), v))


def backward(q, k, v, log_decay, reset, S, dy, D):
    """Cotangents of q, k, v, log_decay and S from those of y and the next state."""
    c, narrow = _Chunk(q, k, log_decay, reset), v.dtype
    dy_n, D_n = dy.astype(narrow), D.astype(narrow)
    d_scores = jnp.where(c.documents.sees[:, None], dot("bihv,bjhv->bhij", dy_n, v), 0)
    row, col = c.products(d_scores)
    dq_start = c.from_start * dot("bihv,bhkv->bihk", dy_n, S.astype(narrow))
    dk_end = c.to_end * dot("bjhv,bhkv->bjhk", v, D_n)
    d_log_decay = gate_gradient(
        c.documents,
        pairs=c.q * (row + dq_start) - c.k * col,
        writes=c.k * dk_end,
        passes=jnp.sum(c.decay * S * D, -1),
    )
    own = jnp.einsum("bhii->bih", d_scores)[..., None]
    dq, dk = row + own * c.k + dq_start, col + own * c.q + dk_end
    dv = dot("bhij,bihv->bjhv", c.scores().astype(narrow), dy_n)
    dv += dot("bjhk,bhkv->bjhv", c.k_end.astype(narrow), D_n)
    D = c.decay * D + dot("bihk,bihv->bhkv", c.q_start.astype(narrow), dy_n)
    group = lambda d, a: d.reshape(*a.shape[:3], -1, a.shape[3]).sum(3)  # [B, C, H, K] -> G
    return group(dq, q), group(dk, k), dv, d_log_decay, None, D


class _Chunk:
    """What the forward and the backward pass of one chunk both need. Letters: m, n blocks."""

    def __init__(self, q, k, log_decay, reset):
        self.narrow = q.dtype
        repeat = log_decay.shape[2] // q.shape[2]
        wide = log_decay.dtype
        self.q, self.k = (jnp.repeat(a, repeat, 2).astype(wide) for a in (q, k))  # [B, C, H, K]
        self.documents = docs = documents(reset)
        sums = decay(log_decay.reshape(*log_decay.shape[:2], -1))
        split = lambda a: a.reshape(*a.shape[:-1], *log_decay.shape[2:])
        masked = lambda seen, x: jnp.exp(jnp.where(seen[..., None], x, -jnp.inf))
        self.from_start = split(masked(docs.enters, sums.before))  # [B, C, H, K]
        self.to_end = split(masked(docs.leaves, sums.after))
        self.decay = split(jnp.where(docs.passes[:, None], jnp.exp(sums.whole), 0))[..., None]
        self.q_start, self.k_end = self.q * self.from_start, self.k * self.to_end
        self.q_in, self.k_out = split(jnp.exp(sums.prefix)), split(jnp.exp(sums.suffix))
        earlier = jnp.tri(sums.between.shape[1], k=-1, dtype=bool)[..., None]
        self.between = split(jnp.exp(jnp.where(earlier, sums.between, -jnp.inf)))
        causal = jnp.tri(BLOCK, dtype=bool)[..., None]
        self.within = split(jnp.exp(jnp.where(causal, sums.within, -jnp.inf)))
        self.q_blocks, self.k_blocks = self._blocks(self.q), self._blocks(self.k)

    def scores(self):
        """A [B, H, C, C]"""
        q = (self.q_blocks * self.q_in)[:, :, None] * self.between[:, :, :, None]
        k = (self.k_blocks * self.k_out).astype(self.narrow)
        A = dot("bmnihk,bnjhk->bhminj", q.astype(self.narrow), k)
        own = jnp.einsum("bmihk,bmjhk,bmijhk->bhmij", self.q_blocks, self.k_blocks, self.within)
        A += own[:, :, :, :, None] * jnp.eye(A.shape[2], dtype=own.dtype)[:, None, :, None]
        B, H, M = A.shape[:3]
        A = A.reshape(B, H, M * BLOCK, M * BLOCK)
        return jnp.where(self.documents.sees[:, None], A, 0)

    def products(self, dA):
        """row_i = sum_j dA_ij decay_ij k_j, col_j = sum_i dA_ij decay_ij q_i, over i != j."""
        B, H, C, _ = dA.shape
        dA = dA.reshape(B, H, C // BLOCK, BLOCK, C // BLOCK, BLOCK)
        narrow = dA.astype(self.narrow)
        q, k = self.q_blocks * self.q_in, self.k_blocks * self.k_out
        row = dot("bhminj,bnjhk->bmnihk", narrow, k.astype(self.narrow))
        col = dot("bhminj,bmihk->bmnjhk", narrow, q.astype(self.narrow))
        row = self.q_in * jnp.sum(row * self.between[:, :, :, None], 2)
        col = self.k_out * jnp.sum(col * self.between[:, :, :, None], 1)
        others = 1 - jnp.eye(BLOCK, dtype=dA.dtype)
        own = jnp.einsum("bhmimj,ij->bmijh", dA, others)[..., None] * self.within
        row += jnp.einsum("bmijhk,bmjhk->bmihk", own, self.k_blocks)
        col += jnp.einsum("bmijhk,bmihk->bmjhk", own, self.q_blocks)
        return row.reshape(self.q.shape), col.reshape(self.k.shape)

    def _blocks(self, a):
        """[B, C, ...] -> [B, M, 16, ...]"""
        return a.reshape(a.shape[0], -1, BLOCK, *a.shape[2:])
