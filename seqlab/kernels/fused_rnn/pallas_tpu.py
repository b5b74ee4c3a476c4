"""The recurrence as TPU kernels: time is a loop inside, R and the state stay in the vector memory.

The grid is (groups of heads, blocks of rows, chunks of time), and chunks follow one another. A step
of all rows of a block is one product with R, which loads it anew: so a block takes as many rows as
there is room for. Backward, what R says to the gates and dR are one product a chunk, and only what
must be sequential is in the loop, as in `xla`. There arrays lie thus, and C tokens of them a step:

    wx, d_wx  [B, T, H G d]    as projections leave them; turned inside, tokens before rows
    y, d_y    [B, T, H d]
    before    [T, H, B, d]     the states before all tokens, kept for the backward pass
    state     [H, B, d]
    reset     [N, B, C]        1 where a token starts a document
    R, dR     [H, d, G d]
    bias      [H, 1, G d]
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.fused_rnn.cells import stepped
from seqlab.kernels.fused_rnn.xla import InXLA
from seqlab.kernels.on_tpu.call import VMEM, call
from seqlab.kernels.on_tpu.tiles import LANES, columns_by_columns, product, rows_by_rows
from seqlab.kernels.precision import widen


def scanned(wx, reset, R, bias, state, *, cell, interpret=False):
    """The definition's arguments and results; `pltpu.InterpretParams()` runs it on any machine."""
    if blocks_of(wx, R, state) is None:
        raise ModelError(
            "The TPU kernel of fused_rnn takes heads whose width is a multiple of 128, or 64 if "
            f"they are even in number, and wx and R of one dtype, not {wx.dtype}{list(wx.shape)} "
            f"and {R.dtype}{list(R.shape)}: leave the implementation to None."
        )
    forms = platforms.Forms(OnTPU(cell, interpret))
    return platforms.scan(forms, (wx, reset, R, bias), tuple(state))


def by_platform(wx, reset, R, bias, state, *, cell):
    """The kernels where it is lowered for a TPU, if they suit, and `xla` elsewhere."""
    on_tpu = OnTPU(cell) if blocks_of(wx, R, state) else None
    return platforms.scan(platforms.Forms(InXLA(cell), on_tpu), (wx, reset, R, bias), tuple(state))


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
        return (
            self.size
            if self.T % self.size == 0
            else jnp.minimum(self.size, self.T - chunk * self.size)
        )

    def bytes(self, operand: int, state: int, leaves: int) -> int:
        """Of the vector memory that the backward pass needs, for the sizes of a number: blocks are
        there twice, because the next is fetched beside the work."""
        tokens, weights = self.size * self.rows * self.heads * self.d, self.heads * self.d**2
        fetched = (2 * self.G + 1) * operand + leaves * state
        turned = (2 * self.G + 1) * state
        return tokens * (2 * fetched + turned) + self.G * weights * 2 * (operand + state)


def blocks_of(wx, R, state) -> Blocks | None:
    """None where the kernels do not suit: XLA makes its own."""
    B, T, H, G, d = wx.shape
    heads = 1 if d % LANES == 0 else LANES // d if d == LANES // 2 else 0
    if not heads or H % heads or wx.dtype != R.dtype:
        return None
    sizes = wx.dtype.itemsize, state[0].dtype.itemsize, len(state)
    whole = [n for n in range(B, 0, -1) if n == B or (B % n == 0 and n % 8 == 0)]
    each = (Blocks(B, T, H, G, d, n, heads, min(T, size)) for n in whole for size in (64, 32, 16))
    return next((blocks for blocks in each if blocks.bytes(*sizes) <= VMEM * 3 // 4), None)


class OnTPU(NamedTuple):
    """The kernels as a form of `platforms.scan`; see `xla.InXLA` for what it keeps."""

    cell: Callable
    interpret: Any = False

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def _forward(self, tokens, state, keep: bool):
        lies = _Lies(tokens, state, backward=False)
        wx, n = tokens[0], len(state)
        blocks, wide = lies.blocks, state[0].dtype
        y = jax.ShapeDtypeStruct((blocks.B, blocks.T, blocks.H * blocks.d), wx.dtype)
        kept = [jax.ShapeDtypeStruct(s, wide) for s in [lies.before] * n * keep]
        last = [jax.ShapeDtypeStruct(a.shape, wide) for a in lies.state(state)]
        y, *rest = call(
            functools.partial(_forward_kernel, blocks=blocks, cell=self.cell, leaves=n),
            blocks.grid,
            [*lies.tokens(tokens), *((a, lies.of_state) for a in lies.state(state))],
            [(y, lies.of_tokens(1)), *((a, lies.of_before) for a in kept)]
            + [(a, lies.of_state) for a in last],
            [lies.turned(blocks.G, wide), lies.turned(1, wide)],
            semantics=("parallel", "parallel", "arbitrary"),
            cost=lies.cost(functools.partial(_step, self.cell, blocks), tokens, n),
            name="fused_rnn_forward",
            interpret=self.interpret,
        )
        y = y.reshape(*wx.shape[:3], blocks.d)
        return (y, lies.state(rest[-n:])), tuple(rest[:-n]) if keep else None

    def backward(self, tokens, entering, d_y, d_state):
        lies = _Lies(tokens, d_state, backward=True)
        wx, _, R, bias = tokens
        blocks, wide, n = lies.blocks, d_state[0].dtype, len(d_state)
        (flat, _), _, (R_flat, of_R), (bias_flat, of_bias) = lies.tokens(tokens)
        of_wx, shape = lies.of_tokens(blocks.G), jax.ShapeDtypeStruct
        given = lies.state(d_state)
        d_wx, dR, d_bias, *D = call(
            functools.partial(_backward_kernel, blocks=blocks, cell=self.cell, leaves=n),
            blocks.grid,
            [*lies.tokens(tokens), *((a, lies.of_before) for a in entering)]
            + [(d_y.reshape(*d_y.shape[:2], -1), lies.of_tokens(1))]
            + [(a, lies.of_state) for a in given],
            [(shape(flat.shape, wx.dtype), of_wx), (shape(R_flat.shape, wide), of_R)]
            + [(shape(bias_flat.shape, wide), of_bias)]
            + [(shape(a.shape, wide), lies.of_state) for a in given],
            [lies.turned(blocks.G, wide), lies.turned(blocks.G, wide), lies.turned(1, wide)],
            semantics=("parallel", "arbitrary", "arbitrary"),
            cost=lies.cost(functools.partial(_step_back, self.cell, blocks), tokens, n),
            name="fused_rnn_backward",
            interpret=self.interpret,
        )
        like = lambda d, a: d.reshape(a.shape).astype(a.dtype)
        return (like(d_wx, wx), None, like(dR, R), like(d_bias, bias)), lies.state(D)


class _Lies:
    """How arrays lie, and the blocks of them."""

    def __init__(self, tokens, state, backward: bool):
        wx, _, R, _ = tokens
        blocks = blocks_of(wx, R, state)
        assert blocks is not None, "blocks_of() is to be asked before"
        self.blocks, self.before = blocks, (blocks.T, blocks.H, blocks.B, blocks.d)
        last = blocks.grid[2] - 1
        time = self.time = lambda n: last - n if backward else n
        heads, rows, size, d = blocks.heads, blocks.rows, blocks.size, blocks.d
        self.of_before = pl.BlockSpec((size, heads, rows, d), lambda h, b, n: (time(n), h, b, 0))
        self.of_state = pl.BlockSpec((heads, rows, d), lambda h, b, n: (h, b, 0))

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
        """[B, H, d] each -> [H, B, d], and back"""
        return tuple(jnp.swapaxes(leaf, 0, 1) for leaf in state)

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


# ---- kernels ----


def _forward_kernel(wx, reset, R, bias, *refs, blocks, cell, leaves):
    initial, (y, *before), state, (steps, ys) = _split(refs, leaves, -2 - leaves, -2)
    chunk, heads = pl.program_id(2), range(blocks.heads)

    @pl.when(chunk == 0)
    def _():
        _copy(state, initial)

    steps[...] = jnp.swapaxes(widen(wx[...]), 0, 1)
    starts = reset[...]

    def step(t, states):
        start, said, after = _at(starts, t), steps[t], []
        for p in heads:
            S = _forget(states[p], start)
            for ref, leaf in zip(before, S, strict=False):
                ref[t, p] = leaf
            rh = product(S[0].astype(R.dtype), R[p]) + bias[p]
            after.append(stepped(cell, blocks.gates(said, p), blocks.gates(rh, 0), S))
            ys[t, :, blocks.head(p)] = after[p][0]
        return tuple(after)

    states = tuple(tuple(leaf[p] for leaf in state) for p in heads)
    states = lax.fori_loop(0, blocks.left(chunk), step, states)
    for p in heads:
        for ref, leaf in zip(state, states[p], strict=True):
            ref[p] = leaf
    y[...] = jnp.swapaxes(ys[...], 0, 1).astype(y.dtype)


def _backward_kernel(wx, reset, R, bias, *refs, blocks, cell, leaves):
    n = leaves
    before, (d_y,), last, (d_wx, dR, d_bias), D, (steps, rhs, d_ys) = _split(
        refs, n, n + 1, 2 * n + 1, -3 - n, -3
    )
    first, heads = pl.program_id(2) == 0, range(blocks.heads)
    left = blocks.left(blocks.grid[2] - 1 - pl.program_id(2))
    few = R.dtype

    @pl.when(first)
    def _():
        _copy(D, last)

    @pl.when(first & (pl.program_id(1) == 0))
    def _():
        dR[...], d_bias[...] = jnp.zeros_like(dR), jnp.zeros_like(d_bias)

    steps[...] = jnp.swapaxes(widen(wx[...]), 0, 1)
    d_ys[...] = jnp.swapaxes(widen(d_y[...]), 0, 1)
    starts = reset[...]
    for p in heads:
        rh = product(_rows(before[0][:, p]).astype(few), R[p]) + bias[p]
        rhs[:, :, blocks.head(p, blocks.G)] = rh.reshape(*rhs.shape[:2], -1)

    def step(i, cotangents):
        t, entering = left - 1 - i, []
        start = _at(starts, t)
        for p, (d_h, *others) in zip(heads, cotangents, strict=True):
            wide = blocks.head(p, blocks.G)
            given = [blocks.gates(ref[t, :, wide], 0) for ref in (steps, rhs)]
            _, pull = jax.vjp(
                functools.partial(stepped, cell), *given, tuple(leaf[t, p] for leaf in before)
            )
            d_said, d_rh, d = pull((d_h + d_ys[t, :, blocks.head(p)], *others))
            steps[t, :, wide], rhs[t, :, wide] = (jnp.concatenate(a, 1) for a in (d_said, d_rh))
            d_h = d[0] + rows_by_rows(rhs[t, :, wide].astype(few), R[p])
            entering.append(_forget((d_h, *d[1:]), start))
        return tuple(entering)

    cotangents = tuple(tuple(leaf[p] for leaf in D) for p in heads)
    cotangents = lax.fori_loop(0, left, step, cotangents)
    d_wx[...] = jnp.swapaxes(steps[...], 0, 1).astype(d_wx.dtype)
    for p in heads:
        for ref, leaf in zip(D, cotangents[p], strict=True):
            ref[p] = leaf
        seen = functools.partial(_within, blocks, left)
        d_rh = _rows(seen(rhs[:, :, blocks.head(p, blocks.G)]))
        dR[p] += columns_by_columns(_rows(seen(before[0][:, p])).astype(few), d_rh.astype(few))
        d_bias[p] += jnp.sum(d_rh, 0, keepdims=True)


def _split(refs, *borders) -> list:
    return [refs[i:j] for i, j in zip((0, *borders), (*borders, None), strict=True)]


def _copy(refs, others) -> None:
    for ref, other in zip(refs, others, strict=True):
        ref[...] = other[...]


def _at(starts, t):
    """Column t of [rows, C]: [rows, 1]"""
    token = lax.broadcasted_iota(jnp.int32, starts.shape, 1)
    return jnp.sum(jnp.where(token == t, starts, 0), 1, keepdims=True)


def _forget(state, start) -> tuple:
    return tuple(jnp.where(start > 0, 0, leaf) for leaf in state)


def _rows(a):
    """[C, rows, X] -> [C rows, X]"""
    return a.reshape(-1, a.shape[-1])


def _within(blocks: Blocks, left, a):
    """a [C, rows, X], 0 beyond the last token."""
    if blocks.T % blocks.size == 0:
        return a
    return jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, 0) < left, a, 0)


# ---- what a step of one head costs ----


def _step(cell, blocks: Blocks, wx, R, *state):
    rh = product(state[0].astype(R.dtype), R)
    return stepped(cell, blocks.gates(wx, 0), blocks.gates(rh, 0), state)


def _step_back(cell, blocks: Blocks, wx, R, *state):
    """With the cell itself for its cotangents, whose transcendentals are the same."""
    after, d_rh = _step(cell, blocks, wx, R, *state), wx.astype(R.dtype)
    return after, rows_by_rows(d_rh, R), columns_by_columns(state[0].astype(R.dtype), d_rh)
