"""Recurrent networks with a non-linear cell and heads that do not see each other's state.

Their steps depend on each other through a product and a non-linearity, so that time cannot be cut
in parallel pieces: there is no transition, and devices along `seq` share rows and heads, not steps.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from seqlab.kernels.fused_rnn import best, pallas_gpu, pallas_tpu, xla
from seqlab.kernels.fused_rnn.cells import advance
from seqlab.kernels.precision import dot, widen
from seqlab.kernels.recurrence import recurrence


@recurrence(
    xla=xla.scanned,
    pallas_tpu=pallas_tpu.scanned,
    pallas_gpu=pallas_gpu.scanned,
    best=best.by_platform,
    weights=2,
)
def fused_rnn(wx, reset, R, bias, state, *, cell: Callable):
    """state_t = cell(wx_t, R h_{t-1} + bias, state_{t-1});  y_t = h_t

    with state_{t-1} = 0 where reset_t (Pöppel et al., 2024: FlashRNN).

    wx     [B, T, H, G, d], what the tokens say to the G gates of the cell
    reset  [B, T] bool, true where a new document starts
    R      [H, d, G, d], from the channels of h to those of each gate: block-diagonal over the heads
    bias   [H, G, d], added to R h
    state  a tuple of arrays [B, H, d] float32, the first of them h
    cell   one of `cells`, or another function like them

    Returns y [B, T, H, d] in the dtype of wx, and the state after the last token. Operands of the
    product with R are in the dtype of R.
    """

    def step(state, token):
        wx, reset = token
        state = tuple(jnp.where(reset[:, None, None], 0, leaf) for leaf in state)
        rh = dot("bhd,hdge->bhge", state[0].astype(R.dtype), R) + bias
        state = advance(cell, wx, rh, state)
        return state, state[0]

    tokens = jnp.moveaxis(widen(wx), 1, 0), reset.T
    last, y = lax.scan(step, tuple(state), tokens)
    return jnp.moveaxis(y, 0, 1).astype(wx.dtype), last
