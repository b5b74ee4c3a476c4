"""The GPU kernels of the recurrence: see `pallas_gpu`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from seqlab.kernels.fused_rnn.cells import stepped
from seqlab.kernels.precision import widen
from seqlab.kernels.tiles import product, rows_by_rows


def forward(wx, reset, R, bias, *refs, cell, lies, leaves: int):
    initial, y, last = refs[:leaves], refs[leaves], refs[leaves + 1 : 2 * leaves + 1]
    before, tile = refs[2 * leaves + 1 :], _Tile(lies)
    R, bias = [R[:, g] for g in tile.gates], [bias[g] for g in tile.gates]

    def step(t, carry):
        state, gates, starts = carry
        following = tile.token(wx, reset, t + 1)  # is on its way while this one is computed
        state = _forget(state, starts)
        for ref, leaf in zip(before, state, strict=False):
            tile.write(ref.at[t], leaf)
        h = state[0].astype(R[0].dtype)
        rh = [product(h, each) + b for each, b in zip(R, bias, strict=True)]
        state = stepped(cell, gates, rh, state)
        tile.write(y.at[:, t], state[0])
        return state, *following

    first = pl.program_id(0) * 0  # interpreted, an index cannot be a constant
    carry = tuple(map(tile.read, initial)), *tile.token(wx, reset, first)
    state, *_ = lax.fori_loop(0, lies.T, step, carry)
    for ref, leaf in zip(last, state, strict=True):
        tile.write(ref, leaf)


def backward(wx, reset, R, rh, *refs, cell, lies, leaves: int):
    before, d_y, d_last = refs[:leaves], refs[leaves], refs[leaves + 1 : 2 * leaves + 1]
    d_wx, d_rh, *d_first = refs[2 * leaves + 1 :]
    tile = _Tile(lies)
    R = [R[:, g] for g in tile.gates]

    def step(i, D):
        t = lies.T - 1 - i
        gates, starts = tile.token(wx, reset, t)
        raw = tuple(tile.read(rh.at[t, :, g]) for g in tile.gates)
        state = tuple(tile.read(ref.at[t]) for ref in before)
        _, pull = jax.vjp(functools.partial(stepped, cell), gates, raw, state)
        d_gates, d_raw, (d_h, *D) = pull((D[0] + tile.read(d_y.at[:, t]), *D[1:]))
        for g, of_wx, of_rh, R_g in zip(tile.gates, d_gates, d_raw, R, strict=True):
            tile.write(d_wx.at[:, t, g], of_wx)
            tile.write(d_rh.at[t, :, g], of_rh)
            d_h += rows_by_rows(of_rh.astype(R_g.dtype), R_g).astype(d_h.dtype)
        return _forget((d_h, *D), starts)

    D = lax.fori_loop(0, lies.T, step, tuple(map(tile.read, d_last)))
    for ref, leaf in zip(d_first, D, strict=True):
        tile.write(ref, leaf)


class _Tile:
    """What a program reads and writes: of its rows those that exist."""

    def __init__(self, lies):
        self.lies = lies
        self.row = pl.program_id(1) * lies.m + jnp.arange(lies.m) < lies.B
        self.real = self.row[:, None]
        self.gates = [pl.ds(g * lies.d, lies.d) for g in range(lies.G)]

    def token(self, wx, reset, t) -> tuple:
        """What token t says to each gate, and whether it starts a document; zeros after the last"""
        here = t < self.lies.T
        gates = tuple(_read(wx.at[:, t, g], self.real & here) for g in self.gates)
        return gates, triton.load(reset.at[:, t], mask=self.row & here, other=0)[:, None] != 0

    def read(self, ref):
        return _read(ref, self.real)

    def write(self, ref, a):
        triton.store(ref, a.astype(ref.dtype), mask=self.real)


def _read(ref, mask):
    return widen(triton.load(ref, mask=mask, other=0))


def _forget(state, starts):
    return tuple(jnp.where(starts, 0, leaf) for leaf in state)
