"""Products of two arrays within a kernel, and the places of a square's elements."""

import jax.numpy as jnp
from jax import lax


def product(a, b, over: tuple[int, int] = (1, 0)):
    """a b, summed over one axis of each, in float32 or wider; operands of at least float32 are not
    rounded, which a TPU's matrix unit does by default."""
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return lax.dot_general(
        a,
        b,
        (((over[0],), (over[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if wide in (a.dtype, b.dtype) else None,
        preferred_element_type=wide,
    )


def rows_by_rows(a, b):
    """a b^T"""
    return product(a, b, (1, 1))


def columns_by_columns(a, b):
    """a^T b"""
    return product(a, b, (0, 0))


def places(size: int):
    """The number of the row and of the column of each element of a square."""
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
