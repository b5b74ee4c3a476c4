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
    """log_decay [B, H, C], C a multiple of 16; sees [B, C, C] as in `documents`"""
    B, H, C = log_decay.shape
    M = C // BLOCK
    blocks = log_decay.reshape(B, H, M, BLOCK)
    each = jnp.sum(blocks, -1)
    later = np.tri(BLOCK)  # [i, t]: t <= i
    before, after = np.tri(M, k=-1), np.tri(M, k=-1).T  # [m, l]: l < m; l > m
    prefix = _sum("it,bhmt->bhmi", later, blocks)
    suffix = _sum("jt,bhmt->bhmj", 1 - later, blocks)
    within = _sum(
        "tij,bhmt->bhmij", (later[:, None] * (1 - later)[None]).transpose(2, 0, 1), blocks
    )
    between = _sum("lmn,bhl->bhmn", (before[:, None] * after[None]).transpose(2, 0, 1), each)
    apart = prefix[..., None, None] + between[:, :, :, None, :, None] + suffix[:, :, None, None]
    same_block = np.eye(M, dtype=bool)[:, None, :, None]
    sums = jnp.where(same_block, within[:, :, :, :, None], apart)  # [B, H, M, 16, N, 16]
    sees = sees.reshape(B, 1, M, BLOCK, M, BLOCK)
    return PairDecay(
        jnp.exp(jnp.where(sees, sums, -jnp.inf)).reshape(B, H, C, C),
        (prefix + _sum("ml,bhl->bhm", before, each)[..., None]).reshape(B, H, C),
        (suffix + _sum("ml,bhl->bhm", after, each)[..., None]).reshape(B, H, C),
        jnp.sum(each, -1),
    )


def _sum(equation: str, mask: np.ndarray, a: jax.Array) -> jax.Array:
    """A masked sum as a product: exact up to its additions, on any precision setting."""
    return jnp.einsum(equation, mask.astype(a.dtype), a, precision=jax.lax.Precision.HIGHEST)
