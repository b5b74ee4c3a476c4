"""Small pieces of TPU kernels: products of two arrays in the vector memory, and what of a chunk's
tokens lies along rows or along columns."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # numbers in a row of a register, of memory and of the matrix unit


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


def column(row):
    """[1, C] -> [C, 1]"""
    i, j = places(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0), 1, keepdims=True)


def row(column):
    """[C, 1] -> [1, C]"""
    i, j = places(column.shape[0])
    return jnp.sum(jnp.where(i == j, column, 0), 0, keepdims=True)


def running(a, combine=jnp.add, empty=0):
    """Sums of each row and those above it; C a power of two. By doubling: nothing is subtracted."""
    place = lax.broadcasted_iota(jnp.int32, a.shape, 0)
    step = 1
    while step < a.shape[0]:
        a = combine(a, jnp.where(place < step, empty, pltpu.roll(a, step, 0)))
        step *= 2
    return a
