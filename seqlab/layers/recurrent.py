"""The recurrent half of a layer with a non-linear cell: its weights, and the call of the kernel."""

from collections.abc import Callable

import jax
from flax import nnx

from seqlab.kernels.fused_rnn import fused_rnn


class Recurrent(nnx.Module):
    """What the H heads of a cell make of wx [B, T, H, G, d]: y [B, T, H, d] and their state.

    R     [H, d, G, d], from the hidden vector of a head to its G gates
    bias  [H, G, d], added to R h
    cell  see `kernels.fused_rnn.cells`
    """

    def __init__(
        self, R: jax.Array, bias: jax.Array, cell: Callable, implementation: str | None = None
    ):
        self.R = nnx.Param(R, axes=("heads", None, None, None))
        self.bias = nnx.Param(bias, axes=("heads", None, None), decay=False)
        self.cell, self.implementation = cell, implementation

    def __call__(self, wx: jax.Array, reset: jax.Array, state: tuple) -> tuple[jax.Array, tuple]:
        return fused_rnn(
            wx,
            reset,
            self.R[...].astype(wx.dtype),
            self.bias[...],
            tuple(state),
            cell=self.cell,
            implementation=self.implementation,
        )
