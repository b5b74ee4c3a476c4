"""The product as a TPU kernel: weights leave the memory packed, and are unpacked where they are
multiplied.

XLA would write unpacked weights back to memory before it multiplies them, four times what it read.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels.ternary_matmul.packing import PER_BYTE, block, rows

ROWS, COLUMNS = 128, 256  # of the output that a step of the grid makes
LARGEST = 2048  # packed rows that it reads at most


def suits(K: int) -> bool:
    """Whether blocks of K inputs fit the vector memory: not where many do not divide by 128."""
    return block(rows(K)) <= LARGEST


def ternary_matmul(x: jax.Array, packed: jax.Array, interpret: Any = False) -> jax.Array:
    """As `kernels.ternary_matmul`; `pltpu.InterpretParams()` runs it on any machine.

    What a block reads beyond the end of x or W is multiplied into columns and rows that do not
    exist, except where K is no multiple of four: there W is zero.
    """
    *lead, K = x.shape
    (R, N), M = packed.shape, math.prod(lead)
    x = jnp.pad(x.reshape(M, K), ((0, 0), (0, -K % PER_BYTE)))
    m, n, b = min(M, ROWS), min(N, COLUMNS), block(R)
    varies = jax.typeof(x).manual_axis_type
    y = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((M, N), jnp.int32, manual_axis_type=varies),
        grid=(pl.cdiv(M, m), pl.cdiv(N, n), R // b),
        in_specs=[
            pl.BlockSpec((m, PER_BYTE * b), lambda i, j, k: (i, k)),
            pl.BlockSpec((b, n), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, k: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="ternary_matmul",
    )(x, packed)
    return y.reshape(*lead, N)


def _kernel(x, packed, y):
    """y += x W for one block of inputs, whose four quarters lie in four pairs of bits."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        y[...] = jnp.zeros_like(y)

    bits, b = packed[...].astype(jnp.int32), packed.shape[0]
    for j in range(PER_BYTE):
        W = ((bits >> 2 * j & 3) - 1).astype(jnp.int8)
        part = x[:, j * b : (j + 1) * b]
        y[...] += lax.dot_general(
            part, W, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )
