"""What softmax attention in a window leaves to be known when its weights meet others: scores that
stand beside those of its tokens, and the largest of them."""

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import dot, widen
from seqlab.kernels.soft_cap import soft_cap
from seqlab.parallel.halo import with_halo


def with_logits(y: jax.Array, lse: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y [B, T, H, V] and log-sum-exp [B, T, H] of queries that see `logits` [n] too: further scores
    in the same softmax, whose values are zero (Nguyen et al., 2025, Lizard)."""
    more = jnp.logaddexp(lse, jax.nn.logsumexp(logits))
    return (jnp.exp(lse - more)[..., None] * widen(y)).astype(y.dtype), more


def largest_score(q, k, before, position, *, scale: float, cap: float | None) -> jax.Array:
    """The largest score of each query in a window of W tokens, [B, T, H], float32 or wider.

    q [B, T, H, K], k [B, T, G, K]; before [B, W, G, K], the keys before these in their order, and
    anything where there are none; position [B, T] in the document.

    All scores are in memory at once, 2 W for each query, which is about as much as the queries are.
    """
    W = before.shape[1]
    last = lambda q, k, position: k[:, -W:]

    def run(q, k, position, before):
        left = jnp.concatenate([before, k], 1)[:, -W:]
        return _largest(q, k, position, before, scale, cap), left

    return with_halo(run, last, W, (q, k, position), before.astype(k.dtype))[0]


def _largest(q, k, position, before, scale, cap):
    """In blocks of C queries, which see the W keys before their block and those of the block."""
    (B, T, H, K), (W, G) = q.shape, before.shape[1:3]
    C = min(W, T)
    N = -(-T // C)  # more than one only if C is W
    q, k, position = (_filled(a, N * C) for a in (q, k, position))
    earlier = jnp.concatenate([before, k], 1)[:, : N * W].reshape(B, N, W, G, K)
    keys = jnp.concatenate([earlier, k.reshape(B, N, C, G, K)], 2)
    scores = dot("bncgrk,bnsgk->bncgrs", q.reshape(B, N, C, G, H // G, K), keys)
    apart = jnp.arange(C)[:, None] + W - jnp.arange(W + C)
    seen = (apart >= 0) & (apart < W) & (apart <= position.reshape(B, N, C, 1))
    scores = jnp.where(seen[:, :, :, None, None], soft_cap(scale * scores, cap), -jnp.inf)
    return jnp.max(scores, -1).reshape(B, N * C, H)[:, :T]


def _filled(a, length: int):
    """[B, T, ...] -> [B, length, ...]"""
    return jnp.pad(a, [(0, 0), (0, length - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
