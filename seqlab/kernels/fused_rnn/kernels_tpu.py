"""The loop over the tokens of a chunk, forward and backward, and what one turn of it costs.

Backward, what R says to the gates and dR are one product a chunk, and only what must be sequential
is in the loop, as in `xla`. Tokens are turned, [C, rows, X], so that a turn takes whole rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from seqlab.kernels.fused_rnn.cells import stepped
from seqlab.kernels.fused_rnn.layout_tpu import Blocks
from seqlab.kernels.precision import widen
from seqlab.kernels.tiles import columns_by_columns, product, rows_by_rows


def forward(wx, reset, R, bias, *refs, blocks, cell, leaves):
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
                ref[t, :, blocks.head(p)] = leaf
            rh = product(S[0].astype(R.dtype), R[p]) + bias[p]
            after.append(stepped(cell, blocks.gates(said, p), blocks.gates(rh, 0), S))
            ys[t, :, blocks.head(p)] = after[p][0]
        return tuple(after)

    states = lax.fori_loop(0, blocks.left(chunk), step, _read(state, blocks))
    _write(state, states, blocks)
    y[...] = jnp.swapaxes(ys[...], 0, 1).astype(y.dtype)


def backward(wx, reset, R, bias, *refs, blocks, cell, leaves):
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
        rh = product(_rows(before[0][:, :, blocks.head(p)]).astype(few), R[p]) + bias[p]
        rhs[:, :, blocks.head(p, blocks.G)] = rh.reshape(*rhs.shape[:2], -1)

    def step(i, cotangents):
        t, entering = left - 1 - i, []
        start = _at(starts, t)
        for p, (d_h, *others) in zip(heads, cotangents, strict=True):
            one, wide = blocks.head(p), blocks.head(p, blocks.G)
            given = [blocks.gates(ref[t, :, wide], 0) for ref in (steps, rhs)]
            _, pull = jax.vjp(
                functools.partial(stepped, cell), *given, tuple(leaf[t, :, one] for leaf in before)
            )
            d_said, d_rh, d = pull((d_h + d_ys[t, :, one], *others))
            steps[t, :, wide], rhs[t, :, wide] = (jnp.concatenate(a, 1) for a in (d_said, d_rh))
            d_h = d[0] + rows_by_rows(rhs[t, :, wide].astype(few), R[p])
            entering.append(_forget((d_h, *d[1:]), start))
        return tuple(entering)

    _write(D, lax.fori_loop(0, left, step, _read(D, blocks)), blocks)
    d_wx[...] = jnp.swapaxes(steps[...], 0, 1).astype(d_wx.dtype)
    for p in heads:
        h, d_rh = before[0][:, :, blocks.head(p)], rhs[:, :, blocks.head(p, blocks.G)]
        h, d_rh = (_rows(_within(blocks, left, a)) for a in (h, d_rh))
        dR[p] += columns_by_columns(h.astype(few), d_rh.astype(few))
        d_bias[p] += jnp.sum(d_rh, 0, keepdims=True)


def _split(refs, *borders) -> list:
    return [refs[i:j] for i, j in zip((0, *borders), (*borders, None), strict=True)]


def _copy(refs, others) -> None:
    for ref, other in zip(refs, others, strict=True):
        ref[...] = other[...]


def _read(state, blocks: Blocks) -> tuple:
    """The leaves of each head."""
    return tuple(tuple(leaf[:, blocks.head(p)] for leaf in state) for p in range(blocks.heads))


def _write(state, states, blocks: Blocks) -> None:
    for p, leaves in enumerate(states):
        for ref, leaf in zip(state, leaves, strict=True):
            ref[:, blocks.head(p)] = leaf


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


def step(cell, blocks: Blocks, wx, R, *state):
    rh = product(state[0].astype(R.dtype), R)
    return stepped(cell, blocks.gates(wx, 0), blocks.gates(rh, 0), state)


def step_back(cell, blocks: Blocks, wx, R, *state):
    """With the cell itself for its cotangents, whose transcendentals are the same."""
    after, d_rh = step(cell, blocks, wx, R, *state), wx.astype(R.dtype)
    return after, rows_by_rows(d_rh, R), columns_by_columns(state[0].astype(R.dtype), d_rh)
