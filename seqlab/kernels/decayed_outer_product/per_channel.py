"""One decay a channel (GLA, HGRN2): decays act inside the products over channels.

Inside, heads stand before tokens, so that every product is a batch of plain ones.
"""

import jax.numpy as jnp

from seqlab.kernels.documents import documents, gate_gradient
from seqlab.kernels.halving import decays, products, scores
from seqlab.kernels.precision import dot
from seqlab.parallel.transitions import Diagonal


def forward(q, k, v, log_decay, reset, S):
    """One chunk: q, k [B, C, G, K], v [B, C, H, V], log_decay [B, C, H, K] -> y, the next S"""
    c = _Chunk(q, k, v, log_decay, reset)
    y = dot("bhij,bhjv->bhiv", c.scores().astype(v.dtype), c.v)
    y += dot("bhik,bhkv->bhiv", c.q_start.astype(v.dtype), S.astype(v.dtype))
    return jnp.swapaxes(y, 1, 2), c.decay * S + c.update()


def transition(q, k, v, log_decay, reset) -> Diagonal:
    c = _Chunk(q, k, v, log_decay, reset)
    return Diagonal(c.decay, c.update())


def backward(q, k, v, log_decay, reset, S, dy, D):
    """Cotangents of q, k, v, log_decay and S from those of y and the next state."""
    c, narrow = _Chunk(q, k, v, log_decay, reset), v.dtype
    dy_n, D_n = jnp.swapaxes(dy, 1, 2).astype(narrow), D.astype(narrow)
    d_scores = jnp.where(c.documents.sees[:, None], dot("bhiv,bhjv->bhij", dy_n, c.v), 0)
    row, col = products(c.sums, d_scores, c.q, c.k, c.narrow)
    dq_start = c.from_start * dot("bhiv,bhkv->bhik", dy_n, S.astype(narrow))
    dk_end = c.to_end * dot("bhjv,bhkv->bhjk", c.v, D_n)
    d_log_decay = gate_gradient(
        c.documents,
        pairs=jnp.swapaxes(c.q * (row + dq_start) - c.k * col, 1, 2),
        writes=jnp.swapaxes(c.k * dk_end, 1, 2),
        passes=jnp.sum(c.decay * S * D, -1),
    )
    own = jnp.einsum("bhii->bhi", d_scores)[..., None]
    dq, dk = row + own * c.k + dq_start, col + own * c.q + dk_end
    dv = dot("bhij,bhiv->bhjv", c.scores().astype(narrow), dy_n)
    dv += dot("bhjk,bhkv->bhjv", c.k_end.astype(narrow), D_n)
    D = c.decay * D + dot("bhik,bhiv->bhkv", c.q_start.astype(narrow), dy_n)
    group = lambda d, a: jnp.swapaxes(d.reshape(len(d), a.shape[2], -1, *d.shape[2:]).sum(2), 1, 2)
    return group(dq, q), group(dk, k), jnp.swapaxes(dv, 1, 2), d_log_decay, None, D


class _Chunk:
    """What the forward and the backward pass of one chunk both need."""

    def __init__(self, q, k, v, log_decay, reset):
        self.narrow = q.dtype
        repeat, wide = v.shape[2] // q.shape[2], log_decay.dtype
        by_head = lambda a: jnp.repeat(jnp.swapaxes(a, 1, 2), repeat, 1).astype(wide)
        self.q, self.k, self.v = by_head(q), by_head(k), jnp.swapaxes(v, 1, 2)  # [B, H, C, ...]
        self.documents = docs = documents(reset)
        self.sums = sums = decays(jnp.swapaxes(log_decay, 1, 2))
        masked = lambda seen, x: jnp.where(seen[:, None, :, None], x, 0)
        self.from_start, self.to_end = (
            masked(docs.enters, sums.before),
            masked(docs.leaves, sums.after),
        )
        self.decay = jnp.where(docs.passes[:, None, None], sums.whole, 0)[..., None]
        self.q_start, self.k_end = self.q * self.from_start, self.k * self.to_end

    def scores(self):
        """A [B, H, C, C]"""
        return jnp.where(
            self.documents.sees[:, None], scores(self.sums, self.q, self.k, self.narrow), 0
        )

    def update(self):
        """What the chunk adds to the state that leaves."""
        return dot("bhjk,bhjv->bhkv", self.k_end.astype(self.v.dtype), self.v)
