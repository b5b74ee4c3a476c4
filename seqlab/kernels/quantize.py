"""Rounding to few bits, as BitNet b1.58 does it (Ma et al., 2024): weights to -1, 0 and 1,
activations to eight bits."""

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import widen

SMALLEST = 1e-5  # of what is divided by: weights or a token may be all zeros


def ternary(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes -1, 0, 1 [...] int8 and one scale [] float32: weight ~ codes * scale.

    The scale is the mean of |weight| over the whole of it, on however many devices it lies. Halves
    round to even, here and everywhere.
    """
    wide = widen(weight)
    scale = jnp.maximum(jnp.mean(jnp.abs(wide)), SMALLEST)
    return jnp.clip(jnp.round(wide * (1 / scale)), -1, 1).astype(jnp.int8), scale


def by_token(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes -128 ... 127 [..., D] int8 and a scale [..., 1] float32 a token: x ~ codes * scale.

    The largest |x| of a token becomes 127, so tokens do not know each other.
    """
    wide = widen(x)
    largest = jnp.maximum(jnp.max(jnp.abs(wide), -1, keepdims=True), SMALLEST)
    return jnp.clip(jnp.round(wide * (127 / largest)), -128, 127).astype(jnp.int8), largest / 127
