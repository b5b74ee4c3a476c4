"""How the arrays of a recurrence lie in a TPU's memory, and what of them a step of the grid takes.

wx, d_wx  [B, T, H G d]    as projections leave them
y, d_y    [B, T, H d]
before    [T, H, B, d]     the states before all tokens, kept for the backward pass
state     [H, B, d]        heads 64 wide two and two side by side in both: [H / 2, B, 2 d]
reset     [N, B, C]        1 where a token starts a document, of chunks of C tokens
R, dR     [H, d, G d]
bias      [H, 1, G d]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels.on_tpu.call import VMEM
from seqlab.kernels.on_tpu.tiles import LANES
from seqlab.kernels.precision import widen


class Blocks(NamedTuple):
    """Of B rows, T tokens and H heads with G gates d wide, what a step of the grid takes."""

    B: int
    T: int
    H: int
    G: int
    d: int
    rows: int
    heads: int
    size: int  # tokens

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.H // self.heads, self.B // self.rows, -(-self.T // self.size)

    def gates(self, x, p: int) -> tuple:
        """[..., heads G d] -> of head p an array for each of its gates."""
        at = lambda g: (p * self.G + g) * self.d
        return tuple(x[..., at(g) : at(g) + self.d] for g in range(self.G))

    def head(self, p: int, gates: int = 1) -> slice:
        """The columns of head p of as many gates."""
        return slice(p * gates * self.d, (p + 1) * gates * self.d)

    def left(self, chunk):
        """Tokens of a chunk."""
        if self.T % self.size == 0:
            return self.size
        return jnp.minimum(self.size, self.T - chunk * self.size)

    def bytes(self, operand: int, state: int, leaves: int) -> int:
        """Of the vector memory that the backward pass needs, for the sizes of a number: blocks are
        there twice, because the next is fetched beside the work."""
        tokens, weights = self.size * self.rows * self.heads * self.d, self.heads * self.d**2
        fetched = (2 * self.G + 1) * operand + leaves * state
        turned = (2 * self.G + 1) * state
        return tokens * (2 * fetched + turned) + self.G * weights * 2 * (operand + state)


def heads_of(wx) -> int:
    """How many heads fill a row of the vector memory."""
    return 2 if wx.shape[-1] == LANES // 2 else 1


def blocks_of(wx, R, state) -> Blocks | None:
    """None where the kernels do not suit: XLA makes its own."""
    B, T, H, G, d = wx.shape
    heads = heads_of(wx)
    if heads * d % LANES or H % heads or wx.dtype != R.dtype:
        return None
    sizes = wx.dtype.itemsize, state[0].dtype.itemsize, len(state)
    whole = [n for n in range(B, 0, -1) if n == B or (B % n == 0 and n % 8 == 0)]
    each = (Blocks(B, T, H, G, d, n, heads, min(T, size)) for n in whole for size in (64, 32, 16))
    return next((blocks for blocks in each if blocks.bytes(*sizes) <= VMEM * 3 // 4), None)


def beside(leaf, n: int):
    """[..., H, B, d] -> [..., H / n, B, n d]"""
    *more, H, B, d = leaf.shape
    return jnp.swapaxes(leaf.reshape(*more, H // n, n, B, d), -3, -2).reshape(*more, H // n, B, -1)


def apart(leaf, n: int):
    """[..., H / n, B, n d] -> [..., H, B, d]"""
    *more, H, B, d = leaf.shape
    return jnp.swapaxes(leaf.reshape(*more, H, B, n, -1), -3, -2).reshape(*more, H * n, B, d // n)


class Lies:
    """How arrays lie, and the blocks of them."""

    def __init__(self, tokens, state, backward: bool):
        wx, _, R, _ = tokens
        blocks = blocks_of(wx, R, state)
        assert blocks is not None, "blocks_of() is to be asked before"
        self.blocks, last = blocks, blocks.grid[2] - 1
        time = self.time = lambda n: last - n if backward else n
        state = None, blocks.rows, blocks.heads * blocks.d
        self.of_state = pl.BlockSpec(state, lambda h, b, n: (h, b, 0))
        self.of_before = pl.BlockSpec((blocks.size, *state), lambda h, b, n: (time(n), h, b, 0))

    def of_tokens(self, gates: int) -> pl.BlockSpec:
        b = self.blocks
        shape = b.rows, b.size, b.heads * gates * b.d
        return pl.BlockSpec(shape, lambda h, b, n: (b, self.time(n), h))

    def tokens(self, tokens) -> list:
        """wx, reset, R and bias with their blocks."""
        wx, reset, R, bias = tokens
        b, columns = self.blocks, self.blocks.G * self.blocks.d
        reset = jnp.pad(reset.astype(jnp.float32), [(0, 0), (0, -b.T % b.size)])
        reset = jnp.moveaxis(reset.reshape(b.B, -1, b.size), 1, 0)
        of_head = lambda n: pl.BlockSpec((b.heads, n, columns), lambda h, b, n: (h, 0, 0))
        of_reset = pl.BlockSpec((None, b.rows, b.size), lambda h, b, n: (self.time(n), b, 0))
        return [
            (wx.reshape(b.B, b.T, b.H * columns), self.of_tokens(b.G)),
            (reset, of_reset),
            (R.reshape(b.H, b.d, columns), of_head(b.d)),
            (widen(bias).reshape(b.H, 1, columns), of_head(1)),
        ]

    def state(self, state) -> tuple:
        """[B, H, d] each, as they lie"""
        return tuple(beside(jnp.swapaxes(leaf, 0, 1), self.blocks.heads) for leaf in state)

    def restored(self, state) -> tuple:
        return tuple(jnp.swapaxes(apart(leaf, self.blocks.heads), 0, 1) for leaf in state)

    def turned(self, gates: int, dtype):
        """Room for a block of tokens, tokens before rows."""
        b = self.blocks
        return pltpu.VMEM((b.size, b.rows, b.heads * gates * b.d), dtype)

    def cost(self, step, tokens, leaves: int) -> tuple:
        """Of a step of one head. R is loaded for each, which takes as long as that many rows."""
        b, wide = self.blocks, jnp.float32
        of = lambda n, dtype=wide: jax.ShapeDtypeStruct((max(b.rows, LANES), n), dtype)
        R = jax.ShapeDtypeStruct((b.d, b.G * b.d), tokens[2].dtype)
        times = b.T * b.H * b.B // b.rows
        return step, [of(b.G * b.d), R, *[of(b.d)] * leaves], times
