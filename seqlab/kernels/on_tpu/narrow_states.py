"""States with keys less than 128 wide, as they are kept between chunks: in whole rows.

A kernel holds a state turned, [V, K], and memory pads its rows to 128 numbers. So of narrow keys
the rows of [K, V] are kept as they stand in order, as many side by side as fill a row: to every
other form that is a reshape.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels.on_tpu.tiles import LANES


def beside(K: int, V: int) -> int | None:
    """How many rows of a state [K, V] make one that is kept; None where it is kept turned."""
    narrow = K < LANES and (V % LANES == 0 or LANES % V == 0)
    return max(LANES // V, 1) if narrow else None


def kept_shape(K: int, V: int) -> tuple[int, int]:
    n = beside(K, V)
    return (V, K) if n is None else (K // n, n * V)


def turned(kept, K: int, V: int):
    """What is kept of states [..., K, V] as it lies, and back."""
    return jnp.swapaxes(kept, -1, -2) if beside(K, V) is None else kept


def room(state) -> list:
    """What `keep` and `kept` need of the vector memory."""
    K, V = state.shape[2:]
    return [] if beside(K, V) is None else [pltpu.VMEM((K, V), state.dtype)]


def keep(ref, p: int, S, room) -> None:
    """Head p of what is kept becomes S [V, K]."""
    if not room:
        ref[p] = S
        return
    [rows], (V, K) = room, S.shape
    rows[...] = S.T
    for part, every in _parts(K, V):
        ref[p, :, part] = rows[every]


def kept(ref, p: int, room):
    """S [V, K] of head p."""
    if not room:
        return ref[p]
    [rows] = room
    for part, every in _parts(*rows.shape):
        rows[every] = ref[p, :, part]
    return rows[...].T


def _parts(K: int, V: int) -> list:
    n = max(LANES // V, 1)
    return [(pl.ds(i * V, V), pl.ds(i, K // n, stride=n)) for i in range(n)]


class Alike(NamedTuple):
    """A form for another platform that keeps states [N, B, H, K, V] as the kernels do."""

    form: Any

    def run(self, tokens, state):
        return self.form.run(tokens, state)

    def keeping(self, tokens, state):
        results, entering = self.form.keeping(tokens, state)
        K, V = state.shape[2:]
        if beside(K, V) is not None:
            entering = entering.reshape(*entering.shape[:3], *kept_shape(K, V))
        return results, entering

    def backward(self, tokens, entering, d_y, d_state):
        return self.form.backward(tokens, entering.reshape(-1, *d_state.shape), d_y, d_state)
