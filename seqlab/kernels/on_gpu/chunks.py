"""Programs on chunks of heads: how they are started, and what they read and write.

Arrays lie as they come, and whole: a program takes what it needs by its place in the grid.

    tokens   [B, T, heads, X], of fewer heads where several share them; T may be rounded up to whole
             chunks. A tile of a chunk is [C, width]
    numbers  [B, H, N C], one a token, or [B, N C] the same for all heads: [C]
    squares  [B, H, N C, C], one row a token: [C, C]
    states   [N, B, H, K, V]; with a normaliser V + 1, of which the last column is taken apart

Tokens beyond the last are read as zeros and not written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from seqlab.kernels.on_gpu import blocks
from seqlab.kernels.on_gpu.blocks import Blocks
from seqlab.kernels.on_gpu.call import call


class Sizes(NamedTuple):
    """B rows of H heads, of which G have keys, and T tokens, in chunks of `size`; keys and values
    are K and V wide. `others` are names of kernels and block sizes in place of the table's."""

    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    size: int
    interpret: Any = False
    others: tuple[tuple[str, Blocks], ...] = ()

    def blocks(self, kernel: Callable) -> Blocks:
        return dict(self.others).get(kernel.__name__) or blocks.chosen(kernel.__name__)

    @property
    def chunks(self) -> int:
        return -(-self.T // self.size)

    @property
    def tokens(self) -> int:
        """Those of whole chunks."""
        return self.chunks * self.size

    def launch(self, kernel: Callable, grid: tuple, inputs, outputs, **static):
        """kernel(inputs, outputs, **static) takes references to arrays, in two trees like these;
        returned are the arrays of the second, of which shapes and dtypes are given."""
        arrays, given = jax.tree.flatten(inputs)
        shapes, made = jax.tree.flatten(outputs)

        def program(*refs):
            read, written = refs[: len(arrays)], refs[len(arrays) :]
            kernel(given.unflatten(read), made.unflatten(written), **static)

        program.__name__ = kernel.__name__  # which profilers show
        whole = lambda arrays: [(a, pl.BlockSpec()) for a in arrays]
        chosen = self.blocks(kernel)
        options: Any = {"name": kernel.__name__, "interpret": self.interpret}
        results = call(program, grid, whole(arrays), whole(shapes), chosen, **options)
        return made.unflatten(results)


def loop(times: Any, body: Callable, start):
    """body(i, found), from `start` on; i is int32 wherever float64 is the default too."""
    return lax.fori_loop(jnp.int32(0), jnp.int32(times), body, start)


def place(sizes: Sizes, heads: int | None = None, size: int | None = None) -> "Place":
    """Of a program in a grid of (pieces, chunks, rows x heads), of all heads and whole chunks if
    not said otherwise."""
    row_and_head = pl.program_id(2), jnp.int32(sizes.H if heads is None else heads)
    b, h = lax.div(*row_and_head), lax.rem(*row_and_head)
    size = sizes.size if size is None else size
    return Place(size, sizes.H, sizes.tokens, b, h, pl.program_id(1))


class Place(NamedTuple):
    """Chunk n of head h of all `heads`, in row b; a chunk has `size` tokens, as have its blocks
    where they are meant, and all chunks `all_tokens`."""

    size: int
    heads: int
    all_tokens: int
    b: Any
    h: Any
    n: Any

    def tokens(self, ref, column: Any = 0, width: int | None = None):
        at, inside = self._tokens(ref, column, ref.shape[3] if width is None else width)
        return at[...] if inside is None else triton.load(at, mask=inside, other=0)

    def put_tokens(self, ref, a, column: Any = 0):
        at, inside = self._tokens(ref, column, a.shape[1])
        if inside is None:
            at[...] = a.astype(ref.dtype)
        else:
            triton.store(at, a.astype(ref.dtype), mask=inside)

    def numbers(self, ref):
        return ref[(self.b, *self._head(ref, 3), self.chunk)]

    def put_numbers(self, ref, a):
        ref[self.b, self.h, self.chunk] = a.astype(ref.dtype)

    def block(self, ref, column):
        """Of a square, cut in blocks of these tokens: one of their rows."""
        return ref[self.b, self.h, self.chunk, pl.ds(column * self.size, self.size)]

    def put_block(self, ref, a, column):
        block = pl.ds(column * self.size, self.size)
        ref[self.b, self.h, self.chunk, block] = a.astype(ref.dtype)

    def square(self, ref):
        return ref[self.b, self.h, self.chunk, :]

    def put_square(self, ref, a):
        ref[self.b, self.h, self.chunk, :] = a.astype(ref.dtype)

    def whole(self, ref, row: Any = 0, rows: int | None = None):
        """Decays of rows of a state [B, H, N, K]: [rows]"""
        return ref[self.b, self.h, self.n, pl.ds(row, ref.shape[3] if rows is None else rows)]

    def put_whole(self, ref, a, row: Any = 0):
        ref[self.b, self.h, self.n, pl.ds(row, len(a))] = a.astype(ref.dtype)

    def state(self, ref, row, rows: int, column, columns: int):
        return ref[self.n, self.b, self.h, pl.ds(row, rows), pl.ds(column, columns)]

    def put_state(self, ref, a, column):
        ref[self.n, self.b, self.h, :, pl.ds(column, a.shape[1])] = a.astype(ref.dtype)

    def norm(self, ref, row: Any = 0, rows: int | None = None):
        """The last column of a state."""
        rows = ref.shape[3] if rows is None else rows
        return ref[self.n, self.b, self.h, pl.ds(row, rows), ref.shape[4] - 1]

    def put_norm(self, ref, a):
        ref[self.n, self.b, self.h, :, ref.shape[4] - 1] = a.astype(ref.dtype)

    @property
    def chunk(self):
        return pl.ds(self.n * self.size, self.size)

    def _head(self, ref, rank: int):
        return (self.h,) if len(ref.shape) == rank else ()

    def _tokens(self, ref, column, width: int):
        head = lax.div(self.h, jnp.int32(self.heads // ref.shape[2]))
        at = ref.at[self.b, self.chunk, head, pl.ds(column, width)]
        if ref.shape[1] == self.all_tokens:
            return at, None
        token = self.n * self.size + lax.broadcasted_iota(jnp.int32, (self.size, width), 0)
        return at, token < ref.shape[1]
