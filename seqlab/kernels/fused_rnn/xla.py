"""The sequential scan, with heads before rows, and its backward pass written out.

Products of a head's rows with its block of R want the head first: [H, B, d] x [H, d, G d] took a
twelfth of the time of [B, H, d] on a CPU. Only what must be sequential is in the loop back:

    rh = R h_{t-1} + bias                  for all t, one product
    d_wx, d_rh, d_state = cell'(...)       step by step, with d_h_{t-1} += R^T d_rh
    dR = sum_t h_{t-1} d_rh^T              for all t, one product

All states are kept, which are no wider than wx; the activations of the gates are computed again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.fused_rnn.cells import advance
from seqlab.kernels.kept import kept
from seqlab.kernels.precision import dot, widen


def scanned(wx, reset, R, bias, state, *, cell):
    """The definition's arguments and results."""
    swapped = lambda state: tuple(jnp.swapaxes(leaf, 0, 1) for leaf in state)
    steps = jnp.transpose(widen(wx), (1, 2, 0, 3, 4))
    y, last = _scan(cell, steps, reset.T, R, bias, swapped(state))  # pyright: ignore
    return jnp.transpose(y, (2, 0, 1, 3)).astype(wx.dtype), swapped(last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(cell, wx, reset, R, bias, state):
    """wx [T, H, B, G, d], reset [T, B], state [H, B, d] -> y [T, H, B, d], state"""

    def step(state, token):
        after, _ = _step(cell, R, bias, state, token)
        return after, after[0]

    last, y = lax.scan(step, state, (wx, reset))
    return y, last


def _step(cell, R, bias, state, token):
    """The state after a token, and the one before it, empty where the token starts a document."""
    wx, reset = token
    before = _forget(state, reset)
    rh = dot("hbd,hdge->hbge", before[0].astype(R.dtype), R) + bias[:, None]
    return advance(cell, wx, rh, before), before


def _forward(cell, wx, reset, R, bias, state):
    def step(state, token):
        after, before = _step(cell, R, bias, state, token)
        return after, (after[0], before)

    last, (y, before) = kept(lax.scan(step, state, (wx, reset)))
    return (y, last), (wx, reset, R, bias, before)


def _backward(cell, saved, cotangents):
    wx, reset, R, bias, before = saved
    dy, d_last = cotangents
    h, R_T = before[0].astype(R.dtype), jnp.transpose(R, (0, 2, 3, 1))
    rh = dot("thbd,hdge->thbge", h, R) + bias[:, None]

    def step(D, token):
        wx, rh, before, reset, dy = token
        _, pull = jax.vjp(functools.partial(advance, cell), wx, rh, before)
        d_wx, d_rh, (d_h, *D) = pull((D[0] + dy, *D[1:]))
        d_h += dot("hbge,hged->hbd", d_rh.astype(R.dtype), R_T).astype(d_h.dtype)
        return _forget((d_h, *D), reset), (d_wx, d_rh)

    D, (d_wx, d_rh) = lax.scan(step, d_last, (wx, rh, before, reset, dy), reverse=True)
    dR = dot("thbd,thbge->hdge", h, d_rh.astype(R.dtype)).astype(R.dtype)
    return d_wx, None, dR, d_rh.sum((0, 2)).astype(bias.dtype), D


_scan.defvjp(_forward, _backward)


def _forget(state, reset):
    return tuple(jnp.where(reset[:, None], 0, leaf) for leaf in state)
