"""How the arrays of a chunked family lie in a TPU's memory, and which of them a step takes.

A token's heads lie one beside the other, as they come; a step takes as many as fill a row of 128
numbers. Only what has one number a head is turned, so that the tokens of a chunk lie in a row.

    wide     [B, T, H, X]       one of its heads is [C, X] inside a kernel
    narrow   [B, T, H(, 1)]     [1, C]
    reset    [B, T] bool        [1, C], the number of the document, which enters the chunk as 0
    state    [B, H, K, V]       [V, K]: a decay a channel lies along rows
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqlab.kernels.on_tpu.narrow_states import kept_shape
from seqlab.kernels.on_tpu.tiles import LANES


class Grid(NamedTuple):
    """B sequences of T tokens; `outer` groups of `inner` steps of `heads` heads each."""

    B: int
    T: int
    size: int  # of a chunk
    outer: int
    inner: int
    heads: int
    backward: bool

    @property
    def chunks(self) -> int:
        return -(-self.T // self.size)

    @property
    def steps(self) -> tuple[int, int, int, int]:
        return self.B, self.outer, self.chunks, self.inner

    @property
    def times(self) -> int:
        """How often a chunk of a head is worked on."""
        return math.prod(self.steps) * self.heads

    @property
    def all_heads(self) -> int:
        return self.outer * self.inner * self.heads

    def time(self, chunk):
        return self.chunks - 1 - chunk if self.backward else chunk


def heads_per_step(widths: list[tuple[int, int]]) -> tuple[int, int, int] | None:
    """outer, inner, heads of `Grid` for wide arrays of these (heads, X); None where blocks of whole
    rows cannot be had."""
    H, G = max(h for h, _ in widths), min(h for h, _ in widths)
    aligned = lambda h, n: all(h == n or n * X % LANES == 0 for heads, X in widths if heads == h)
    group = H // G
    if any(h not in (H, G) for h, _ in widths) or H % G:
        return None
    for heads in (1, 2):
        if group == 1 and H % heads == 0 and aligned(H, heads):
            return H // heads, 1, heads
        if group > 1 and group % heads == 0 and aligned(H, heads) and aligned(G, 1):
            return G, group // heads, heads
    return None


def is_narrow(a) -> bool:
    return a.ndim == 3 or (a.ndim == 4 and a.shape[3] == 1)


def heads_of(a, grid: Grid) -> int:
    """How many heads of it a step takes."""
    return grid.heads if a.shape[2] == grid.all_heads else 1


def grid_of(tokens, size: int, backward: bool) -> Grid:
    found = heads_per_step([a.shape[2:] for a in tokens if a.ndim == 4 and not is_narrow(a)])
    assert found is not None, "suits() is to be asked before"
    B, T = tokens[0].shape[:2]
    outer, inner, heads = found
    return Grid(B, T, size, outer, inner, heads, backward)


def laid(arrays, grid: Grid) -> list:
    """Each as it lies, and the block of it that a step takes."""
    return [(_laid(a, grid), _block(a, grid)) for a in arrays]


def to_lay(arrays, grid: Grid) -> list:
    """The same of results that are still to be made: shapes and dtypes."""
    shape = lambda a: jax.eval_shape(lambda a: _laid(a, grid), a)
    return [(shape(a), _block(a, grid)) for a in shapes(arrays)]


def restored(laid, a):
    """`laid` in the shape of a."""
    if is_narrow(a):
        B, H, N, _, C = laid.shape
        laid = jnp.moveaxis(laid.reshape(B, H, N * C), -1, 1)
    return laid[:, : a.shape[1]].reshape(a.shape)


def turned(state):
    return jnp.swapaxes(state, -1, -2)


def state_block(grid: Grid, state) -> pl.BlockSpec:
    """The states [B, H, V, K] of all heads of a group, which stay for all its steps."""
    shape = (None, grid.inner * grid.heads, state.shape[3], state.shape[2])
    return pl.BlockSpec(shape, lambda b, o, c, i: (b, o, 0, 0))


def to_turn(state, grid: Grid) -> tuple:
    """A state that is still to be made, and its block."""
    [shape] = shapes([jax.eval_shape(turned, state)])
    return shape, state_block(grid, state)


def kept_block(grid: Grid, state) -> tuple:
    """The states that enter the chunks, as they are kept, and the block of them."""
    B, H, *one = state.shape
    index = lambda b, o, c, i: (grid.time(c), b, o * grid.inner + i, 0, 0)
    shape = jax.ShapeDtypeStruct((grid.chunks, B, H, *kept_shape(*one)), state.dtype)
    return shape, pl.BlockSpec((None, None, grid.heads, *kept_shape(*one)), index)


def tiles_of(arrays, grid: Grid) -> list:
    """Shapes and dtypes of what a chunk's functions take."""
    wide = lambda a: a.ndim == 4 and not is_narrow(a)
    return [
        jax.ShapeDtypeStruct((grid.size, a.shape[3]), a.dtype)
        if wide(a)
        else jax.ShapeDtypeStruct((1, grid.size), jnp.float32)
        for a in arrays
    ]


def tile_of(state):
    return jax.ShapeDtypeStruct((state.shape[3], state.shape[2]), state.dtype)


def shapes(arrays) -> list:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]


def _laid(a, grid: Grid):
    if a.ndim == 2:
        return jnp.cumsum(_by_chunk(a, grid), -1).astype(jnp.float32)
    if is_narrow(a):
        return _by_chunk(a.reshape(a.shape[:3]), grid)
    a = a.reshape(*a.shape[:2], -1)
    return jnp.pad(a, [(0, 0), (0, max(0, grid.size - grid.T)), (0, 0)])  # a block at least


def _by_chunk(a, grid: Grid):
    """[B, T, ...] -> [B, ..., N, 1, C], padded with zeros"""
    a = jnp.pad(a, [(0, 0), (0, -grid.T % grid.size)] + [(0, 0)] * (a.ndim - 2))
    a = jnp.moveaxis(a, 1, -1)
    return a.reshape(*a.shape[:-1], grid.chunks, 1, grid.size)


def _block(a, grid: Grid) -> pl.BlockSpec:
    time, size, heads, inner = grid.time, grid.size, grid.heads, grid.inner
    if a.ndim == 2:
        return pl.BlockSpec((None, None, 1, size), lambda b, o, c, i: (b, time(c), 0, 0))
    if is_narrow(a):
        index = lambda b, o, c, i: (b, o * inner + i, time(c), 0, 0)
        return pl.BlockSpec((None, heads, None, 1, size), index)
    own = a.shape[2] == grid.all_heads
    index = lambda b, o, c, i: (b, time(c), o * inner + i if own else o)
    return pl.BlockSpec((None, size, heads_of(a, grid) * a.shape[3]), index)
