"""Small pieces of TPU kernels: what of a chunk's tokens lies along rows or along columns."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels.tiles import places

LANES = 128  # numbers in a row of a register, of memory and of the matrix unit


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
