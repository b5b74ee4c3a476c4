"""The product as a GPU kernel: weights leave the memory packed, and are unpacked where they are
multiplied, in integers.

A program makes a tile of the output from a stretch of the inputs. Of one token there are few tiles,
so several programs share its inputs; their sums of integers are added afterwards.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from seqlab.kernels.on_gpu import blocks, trust, tuning
from seqlab.kernels.on_gpu.blocks import Blocks
from seqlab.kernels.on_gpu.call import call
from seqlab.kernels.ternary_matmul.packing import PER_BYTE, block, pack, unpack

FEW = 16  # rows of x, which the matrix unit takes at least


def ternary_matmul(
    x: jax.Array, packed: jax.Array, interpret: bool = False, sizes: Blocks | None = None
) -> jax.Array:
    """As `kernels.ternary_matmul`; `interpret` runs it on any machine.

    sizes  rows and columns of a tile, packed rows that are unpacked at once, and programs that
           share the inputs; None takes those of the table
    """
    *lead, K = x.shape
    (R, N), M = packed.shape, math.prod(lead)
    sizes = sizes or blocks.chosen("ternary_matmul", "few rows" if M <= FEW else "many rows")
    m, n, k, programs = sizes.block
    shares = jax.ShapeDtypeStruct((programs, M, N), jnp.int32)
    [y] = call(
        functools.partial(ternary_matmul_kernel, shape=(M, K, N), sizes=sizes.block),
        (pl.cdiv(M, m), pl.cdiv(N, n), programs),
        [
            (x.reshape(M, K), pl.BlockSpec((m, K), lambda i, j, p: (i, 0))),
            (packed, pl.BlockSpec((R, n), lambda i, j, p: (0, j))),
        ],
        [(shares, pl.BlockSpec((None, m, n), lambda i, j, p: (p, i, j)))],
        sizes,
        name="ternary_matmul",
        interpret=interpret,
    )
    return jnp.sum(y, 0).reshape(*lead, N)


def ternary_matmul_kernel(x, packed, y, *, shape, sizes):
    """The share of program p: of all steps of k packed rows, p, p + programs, ..."""
    (M, K, N), (m, n, k, programs), (R, _) = shape, sizes, packed.shape
    b = block(R)
    per_block = pl.cdiv(b, k)
    steps, program = R // b * per_block, pl.program_id(2)
    rows = pl.program_id(0) * m + jnp.arange(m) < M
    columns = pl.program_id(1) * n + jnp.arange(n) < N

    def step(i, total):
        at = i * programs + program
        of, first = at // per_block, at % per_block * k  # its block of inputs, and where in that
        inside = (first + jnp.arange(k) < b) & (at < steps)
        mask = inside[:, None] & columns[None]
        bits = triton.load(packed.at[pl.ds(of * b + first, k)], mask=mask, other=0)
        bits = bits.astype(jnp.int32)
        for j in range(PER_BYTE):
            start = (PER_BYTE * of + j) * b + first
            mask = rows[:, None] & (inside & (start + jnp.arange(k) < K))[None]
            part = triton.load(x.at[:, pl.ds(start, k)], mask=mask, other=0)
            W = ((bits >> 2 * j & 3) - 1).astype(jnp.int8)
            total += lax.dot(part, W, preferred_element_type=jnp.int32)
        return total

    total = lax.fori_loop(0, pl.cdiv(steps, programs), step, jnp.zeros((m, n), jnp.int32))
    triton.store(y, total, mask=rows[:, None] & columns[None])


# ---- what it is tried and measured on ----


@trust.trial_of("ternary_matmul", dtypes=("int8",))
def trial(dtype) -> trust.Trial:
    x, packed = _arguments(20, 300, 70)
    plain = lambda x, W: jnp.matmul(x.astype(jnp.int32), unpack(W, 300).astype(jnp.int32))
    return trust.Trial(ternary_matmul, plain, (x.astype(dtype), packed))


@tuning.contests_of("ternary_matmul")
def contests() -> list[tuning.Contest]:
    """A projection of a model of 3B parameters, of a token and of a batch."""
    run = lambda sizes: functools.partial(ternary_matmul, sizes=sizes)
    few = [
        Blocks((16, n, k, p), 4, s)
        for n in (32, 64, 128)
        for k in (32, 64)
        for p in (1, 4, 8)
        for s in (2, 4)
    ]
    many = [
        Blocks((m, n, k, 1), w, 3)
        for m in (64, 128)
        for n in (64, 128)
        for k in (32, 64)
        for w in (4, 8)
    ]
    return [
        tuning.Contest("few rows", run, _arguments(1, 3200, 8640), tuple(few)),
        tuning.Contest("many rows", run, _arguments(4096, 3200, 8640), tuple(many)),
    ]


def _arguments(M: int, K: int, N: int) -> tuple:
    rng = np.random.default_rng(0)
    x, W = rng.integers(-127, 128, (M, K)), rng.integers(-1, 2, (K, N))
    return x.astype(np.int8), pack(jnp.asarray(W, jnp.int8))
