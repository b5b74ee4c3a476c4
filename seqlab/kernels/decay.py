"""Sums of log decays between the tokens of a chunk, formed by additions only.

A difference of cumulative sums loses the small sums behind the large ones: after a few gates of -80
a gate of -0.001 is rounded away. So a chunk is cut in blocks of 16, and the decay from token j to
token i > j is the sum of at most three parts, none of which subtracts: the gates after j in its
block, those of the blocks between, and those up to i in its block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 16


class Decay(NamedTuple):
    """Sums of log decays, all <= 0, for M = N = C / 16 blocks; X stands for the trailing axes."""

    prefix: jax.Array  # [B, M, 16, X] from the block's first token up to i
    suffix: jax.Array  # [B, M, 16, X] of the block's tokens after j
    between: jax.Array  # [B, M, N, X] of the blocks after n and before m; for n < m
    within: jax.Array  # [B, M, 16, 16, X] of the block's tokens after j up to i; for j <= i
    before: jax.Array  # [B, C, X] from the chunk's first token up to i
    after: jax.Array  # [B, C, X] of the chunk's tokens after j
    whole: jax.Array  # [B, X] of all the chunk's tokens


def decay(log_decay: jax.Array) -> Decay:
    """log_decay [B, C, X], C a multiple of 16"""
    blocks = log_decay.reshape(log_decay.shape[0], -1, BLOCK, log_decay.shape[-1])
    M = blocks.shape[1]
    each = jnp.sum(blocks, 2)
    later = np.tri(BLOCK)  # [i, t]: t <= i
    prefix = _sum("it,bmtx->bmix", later, blocks)
    suffix = _sum("jt,bmtx->bmjx", 1 - later, blocks)
    within = _sum("ijt,bmtx->bmijx", later[:, None] * (1 - later)[None], blocks)
    before, after = np.tri(M, k=-1), np.tri(M, k=-1).T  # [m, l]: l < m; l > m
    between = _sum("mnl,blx->bmnx", before[:, None] * after[None], each)
    from_start = prefix + _sum("ml,blx->bmx", before, each)[:, :, None]
    to_end = suffix + _sum("ml,blx->bmx", after, each)[:, :, None]
    return Decay(
        prefix,
        suffix,
        between,
        within,
        from_start.reshape(log_decay.shape),
        to_end.reshape(log_decay.shape),
        jnp.sum(each, 1),
    )


def _sum(equation: str, mask: np.ndarray, a: jax.Array) -> jax.Array:
    """A masked sum as a product: exact up to its additions, on any precision setting."""
    return jnp.einsum(equation, mask.astype(a.dtype), a, precision=jax.lax.Precision.HIGHEST)
