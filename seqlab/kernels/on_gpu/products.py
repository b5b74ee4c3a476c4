"""Products on tensor cores that lose nothing of an operand in float32."""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.tiles import product


def exactly(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """a b, summed over one axis of each, of which one is float32 and the other bfloat16.

    Tensor cores round float32 to ten bits; so it is taken apart. A mask is a bfloat16 too. Of other
    dtypes both are the same, and nothing is rounded.
    """
    if a.dtype == b.dtype:
        return product(a, b, over)
    pairs = (
        [(part, b) for part in _parts(a)]
        if b.dtype == jnp.bfloat16
        else [(a, part) for part in _parts(b)]
    )
    last, middle, first = (product(a, b, over) for a, b in pairs[::-1])
    return last + middle + first


def chosen_sums(mask: jax.Array, a: jax.Array) -> jax.Array:
    """For each row of a mask [X, Y], the sum of the rows of a [Y, K] that it chooses, in float32 or
    wider: by additions only."""
    few = jnp.bfloat16 if a.dtype == jnp.float32 else a.dtype
    return exactly(jnp.where(mask, 1.0, 0.0).astype(few), a)


def _parts(a):
    """Three arrays of eight bits, whose sum a is."""
    first = _cut(a)
    second = _cut(a - first)
    return [x.astype(jnp.bfloat16) for x in (first, second, a - first - second)]


def _cut(a):
    """Without the bits that a bfloat16 lacks: XLA may leave out conversions, but not this."""
    bits = lax.bitcast_convert_type(a, jnp.uint32)
    return lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
