"""The scan over chunks as a pair of TPU kernels, forward and backward, for any family.

The grid is (batch, groups of heads, chunks, heads of a group): chunks follow one another, so a
state stays in the vector memory from the first to the last, and keys that the heads of a group
share are fetched once for all of them. `layout` says how arrays lie.
"""

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ModelError
from seqlab.kernels.on_tpu import narrow_states
from seqlab.kernels.on_tpu.call import VMEM, call
from seqlab.kernels.on_tpu.layout import (
    Grid,
    grid_of,
    heads_of,
    heads_per_step,
    is_narrow,
    kept_block,
    laid,
    restored,
    shapes,
    state_block,
    tile_of,
    tiles_of,
    to_lay,
    to_turn,
    turned,
)

WIDTHS = (64, 128, 256, 512)  # of keys and values
SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")


class Chunk(Protocol):
    """What a family defines for one chunk of one head, on the arrays of two axes named above."""

    name: str

    def results(self, *tokens) -> tuple[Any, ...]:
        """Shapes and dtypes of all tokens' results"""
        ...

    def forward(self, *args) -> tuple[tuple[Any, ...], Any]:
        """*tokens, the state that enters -> results, the state that leaves"""
        ...

    def backward(self, *args) -> tuple:
        """*tokens, the state that enters, cotangents of the results and of the state that leaves ->
        the cotangents of every token array but reset, and of the state"""
        ...


class OnTPU(NamedTuple):
    """The kernels as a form of `platforms.scan`."""

    chunk: Any
    size: int
    interpret: Any = False

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def backward(self, tokens, entering, d_y, d_state):
        d_y = tuple(jax.tree.leaves(d_y))
        return backward(self.chunk, tokens, entering, d_y, d_state, self.size, self.interpret)

    def alike(self, form):
        """What is kept of narrow keys is kept so on other platforms too."""
        return narrow_states.Alike(form)

    def _forward(self, tokens, state, keep: bool):
        ys, state, entering = forward(self.chunk, tokens, state, self.size, keep, self.interpret)
        return (tuple(ys) if len(ys) > 1 else ys[0], state), entering


def suits(tokens: tuple, state, operands: int = 3) -> bool:
    """Whether the kernels can run q, k, v, ..., of which the first are operands of products: of
    what they cannot, XLA makes its own."""
    wide = [a for a in tokens if a.ndim == 4 and not is_narrow(a)]
    grid = heads_per_step([a.shape[2:] for a in wide])
    if grid is None or not {a.shape[3] for a in wide} <= set(WIDTHS):
        return False
    _, inner, heads = grid
    states = inner * heads * math.prod(state.shape[2:]) * state.dtype.itemsize
    fits = 4 * states <= VMEM // 2  # what enters and what leaves, and each twice
    return fits and len({a.dtype for a in tokens[:operands]}) == 1


def require(name: str, tokens: tuple, state, operands: int = 3) -> None:
    """ModelError where they cannot."""
    if not suits(tokens, state, operands):
        q, _, v, *_ = tokens
        raise ModelError(
            f"The TPU kernel of {name} takes keys and values of one dtype and of width "
            f"{', '.join(map(str, WIDTHS))}, not {q.dtype}{list(q.shape)} and "
            f"{v.dtype}{list(v.shape)}: leave the implementation to None."
        )


def forward(chunk: Chunk, tokens, state, size: int, keep: bool, interpret=False):
    """The results, the state after the last token and, if `keep`, those that enter the chunks
    [N, B, H, K, V], or as `narrow_states` has them."""
    grid, results = grid_of(tokens, size, backward=False), chunk.results(*tokens)
    kept = kept_block(grid, state)
    *ys, last = call(
        functools.partial(
            _forward_kernel, chunk=chunk, grid=grid, tokens=shapes(tokens), keep=keep
        ),
        grid.steps,
        [*laid(tokens, grid), (turned(state), state_block(grid, state))],
        [*to_lay(results, grid), *([kept] if keep else []), to_turn(state, grid)],
        narrow_states.room(state) if keep else [],
        semantics=SEMANTICS,
        cost=(chunk.forward, [*tiles_of(tokens, grid), tile_of(state)], grid.times),
        name=f"{chunk.name}_forward",
        interpret=interpret,
    )
    entering = narrow_states.turned(ys.pop(), *state.shape[2:]) if keep else None
    return list(map(restored, ys, results)), turned(last), entering


def backward(chunk: Chunk, tokens, entering, d_results, d_state, size: int, interpret=False):
    """Cotangents of the tokens (None for reset) and of the state."""
    grid, floats = grid_of(tokens, size, backward=True), [a for a in tokens if a.dtype != bool]
    shared = [a for a in floats if a.shape[2] < grid.all_heads and grid.inner > 1]
    given, d_given = shapes(tokens), shapes(d_results)
    _, kept = kept_block(grid, d_state)
    entering = narrow_states.turned(entering, *d_state.shape[2:])
    *d, d_first = call(
        functools.partial(
            _backward_kernel,
            chunk=chunk,
            grid=grid,
            tokens=given,
            d_results=d_given,
            shared=len(shared),
        ),
        grid.steps,
        [*laid(tokens, grid), (entering, kept), *laid(d_results, grid)]
        + [(turned(d_state), state_block(grid, d_state))],
        [*to_lay(floats, grid), to_turn(d_state, grid)],
        [pltpu.VMEM((size, a.shape[3]), d_state.dtype) for a in shared]
        + narrow_states.room(d_state),
        semantics=SEMANTICS,
        cost=(
            chunk.backward,
            [*tiles_of(tokens, grid), tile_of(d_state)]
            + [*tiles_of(d_results, grid), tile_of(d_state)],
            grid.times,
        ),
        name=f"{chunk.name}_backward",
        interpret=interpret,
    )
    found = iter(d)
    d_tokens = [None if a.dtype == bool else restored(next(found), a) for a in tokens]
    return tuple(d_tokens), turned(d_first)


# ---- kernels ----


def _forward_kernel(*refs, chunk, grid, tokens, keep):
    inputs, (initial, *outputs) = refs[: len(tokens)], refs[len(tokens) :]
    m = len(chunk.results(*tokens))
    results, entering = outputs[:m], outputs[m : m + keep]
    state, *room = outputs[m + keep :]
    for p, h in _heads(grid):

        @pl.when(pl.program_id(2) == 0)
        def _(h=h):
            state[h] = initial[h]

        S = state[h]
        for ref in entering:
            narrow_states.keep(ref, p, S, room)
        ys, state[h] = chunk.forward(*_read(inputs, tokens, grid, p), S)
        for ref, y in zip(results, ys, strict=True):
            _write(ref, y, p)


def _backward_kernel(*refs, chunk, grid, tokens, d_results, shared):
    n, m = len(tokens), len(d_results)
    inputs, entering, cotangents, last = refs[:n], refs[n], refs[n + 1 : n + 1 + m], refs[n + 1 + m]
    floats = [a for a in tokens if a.dtype != bool]
    outputs = refs[n + m + 2 :]
    d_tokens, (state, *scratch) = outputs[: len(floats)], outputs[len(floats) :]
    sums, room = iter(scratch[:shared]), scratch[shared:]
    found = []
    for p, h in _heads(grid):

        @pl.when(pl.program_id(2) == 0)
        def _(h=h):
            state[h] = last[h]

        *d, state[h] = chunk.backward(
            *_read(inputs, tokens, grid, p),
            narrow_states.kept(entering, p, room),
            *_read(cotangents, d_results, grid, p),
            state[h],
        )
        found.append(d)
    for ref, a, *d in zip(d_tokens, floats, *found, strict=True):
        if a.shape[2] == grid.all_heads:
            for p, each in enumerate(d):
                _write(ref, each, p)
        else:
            _add_over_heads(ref, sum(d), grid, sums)


def _add_over_heads(ref, d, grid: Grid, sums):
    """The cotangent of what the heads of a group share, written when the last has added to it."""
    if grid.inner == 1:
        ref[...] = d.astype(ref.dtype)
        return
    added, step = next(sums), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        added[...] = jnp.zeros_like(added)

    added[...] += d

    @pl.when(step == grid.inner - 1)
    def _():
        ref[...] = added[...].astype(ref.dtype)


def _heads(grid: Grid):
    """The heads of a step: its number in the step, and in the group."""
    first = pl.program_id(3) * grid.heads if grid.inner > 1 else 0
    return [(p, first + p) for p in range(grid.heads)]


def _read(refs, arrays, grid: Grid, p: int):
    return [_tile_of(ref, a, grid, p) for ref, a in zip(refs, arrays, strict=True)]


def _tile_of(ref, a, grid: Grid, p: int):
    """Head p of a block: tokens beyond the last are zeros, which leave a state be."""
    if a.ndim == 2:
        return ref[...]
    if is_narrow(a):
        return ref[p]
    X = a.shape[3]
    x = ref[:, p * X : (p + 1) * X] if heads_of(a, grid) > 1 else ref[...]
    if grid.T % grid.size == 0:
        return x
    token = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    left = grid.T - grid.time(pl.program_id(2)) * grid.size
    return jnp.where(token < left, x, jnp.zeros((), x.dtype))


def _write(ref, x, p: int):
    """Head p of a block, narrow or wide."""
    if ref.ndim == 3:
        ref[p] = x.astype(ref.dtype)
    else:
        X = x.shape[1]
        ref[:, p * X : (p + 1) * X] = x.astype(ref.dtype)
