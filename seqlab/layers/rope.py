"""Positions within documents, and rotary position embedding (Su et al., 2021, RoFormer, eq. 34)."""

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import widen


def positions(reset: jax.Array, start: jax.Array) -> jax.Array:
    """How many tokens of its own document come before each token.

    reset [B, T] bool, true where a document starts; start [B] int32, the position of the first
    token if no document starts there. Returns [B, T] int32.
    """
    t = jnp.arange(reset.shape[1], dtype=jnp.int32)
    began = jax.lax.cummax(jnp.where(reset, t, -start[:, None]), axis=1)
    return t - began


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotate channel pairs (i, i + K/2) by position * base^(-2i/K); scores then see distances only.

    x [B, T, H, K] with K even, positions [B, T] -> [B, T, H, K] in the dtype of x. Channels pair
    up across the halves of a head, as in Llama's weights, not with their neighbours.
    """
    wide, half = widen(x), x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=wide.dtype) / half)
    angle = positions[..., None, None].astype(wide.dtype) * frequency  # [B, T, 1, K / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(wide, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
