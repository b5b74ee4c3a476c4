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


def chunk_length(tokens: jax.Array, chunk_size: int) -> int:
    """For tokens [B, T, ...]: no more than there are, rounded up to a power of two from 16 on."""
    size = min(chunk_size, tokens.shape[1])
    return max(BLOCK, 1 << (size - 1).bit_length())


class PairDecay(NamedTuple):
    """Of one decay a head, heads before tokens."""

    pairs: jax.Array  # [B, H, C, C] the decay itself from token j to token i; 0 unless i sees j
    before: jax.Array  # [B, H, C] sum from the chunk's first token up to i
    after: jax.Array  # [B, H, C] sum of the chunk's tokens after j
    whole: jax.Array  # [B, H] sum of all the chunk's tokens


def pair_decay(log_decay: jax.Array, sees: jax.Array) -> PairDecay:
    """log_decay [B, H, C], <= 0, C a multiple of 16; sees [B, C, C] as in `documents`"""
    B, H, C = log_decay.shape
    M = C // BLOCK
    inside, earlier = np.tri(BLOCK), np.tri(M, k=-1)
    upto, behind, within = _sums(log_decay.reshape(B, H, M, BLOCK), inside, 1 - inside)
    each = upto[..., -1]
    before, after, between = _sums(each, earlier, earlier.T)
    # exponentials of parts, not of every pair's sum: factors <= 1
    across = jnp.exp(between)[:, :, :, None, :, None]
    apart = jnp.exp(upto)[..., None, None] * across * jnp.exp(behind)[:, :, None, None]
    same_block = np.eye(M, dtype=bool)[:, None, :, None]
    pairs = jnp.where(same_block, jnp.exp(within)[:, :, :, :, None], apart)  # [B, H, M, 16, N, 16]
    return PairDecay(
        jnp.where(sees[:, None], pairs.reshape(B, H, C, C), 0),
        (upto + before[..., None]).reshape(B, H, C),
        (behind + after[..., None]).reshape(B, H, C),
        jnp.sum(each, -1),
    )


def _sums(a: jax.Array, first: np.ndarray, last: np.ndarray):
    """Of a [..., n] the sums over t with first[i, t], over t with last[j, t], and over those with
    both: [..., n], [..., n] and [..., i, j]. Masked sums as one product: exact up to its additions,
    on any precision setting."""
    n = len(first)
    both = (first[:, None] * last[None]).reshape(n * n, n)
    masks = np.concatenate([first, last, both]).T.astype(a.dtype)
    sums = jnp.matmul(a, masks, precision=jax.lax.Precision.HIGHEST)
    return sums[..., :n], sums[..., n : 2 * n], sums[..., 2 * n :].reshape(*a.shape, n)
