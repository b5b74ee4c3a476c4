"""The sequential scan, with heads before rows, and its backward pass written out.

Products of a head's rows with its block of R want the head first: [H, B, d] x [H, d, G d] took a
twelfth of the time of [B, H, d] on a CPU. Only what must be sequential is in the loop back:

    rh = R h_{t-1} + bias                  for all t, one product
    d_wx, d_rh, d_state = cell'(...)       step by step, with d_h_{t-1} += R^T d_rh
    dR = sum_t h_{t-1} d_rh^T              for all t, one product

All states are kept, which are no wider than wx; the activations of the gates are computed again.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels import platforms
from seqlab.kernels.fused_rnn.cells import advance
from seqlab.kernels.precision import dot, widen


def scanned(wx, reset, R, bias, state, *, cell):
    """The definition's arguments and results."""
    return platforms.scan(platforms.Forms(InXLA(cell)), (wx, reset, R, bias), tuple(state))


class InXLA(NamedTuple):
    """The scan as a form of `platforms.scan`, with R and bias behind the tokens. It keeps the
    states before all tokens, [T, H, B, d] each, empty where a token starts a document."""

    cell: Callable

    def run(self, tokens, state):
        results, _ = self._scan(tokens, state, keep=False)
        return results

    def keeping(self, tokens, state):
        return self._scan(tokens, state, keep=True)

    def _scan(self, tokens, state, keep: bool):
        wx, reset, R, bias = tokens

        def step(state, token):
            wx, reset = token
            before = _forget(state, reset)
            rh = dot("hbd,hdge->hbge", before[0].astype(R.dtype), R) + bias[:, None]
            after = advance(self.cell, wx, rh, before)
            return after, (after[0], before if keep else None)

        last, (y, before) = lax.scan(step, _turned(state), (_steps(wx), reset.T))
        return (jnp.transpose(y, (2, 0, 1, 3)).astype(wx.dtype), _turned(last)), before

    def backward(self, tokens, entering, d_y, d_state):
        wx, reset, R, bias = tokens
        h, R_T = entering[0].astype(R.dtype), jnp.transpose(R, (0, 2, 3, 1))
        rh = dot("thbd,hdge->thbge", h, R) + bias[:, None]

        def step(D, token):
            wx, rh, before, reset, dy = token
            _, pull = jax.vjp(functools.partial(advance, self.cell), wx, rh, before)
            d_wx, d_rh, (d_h, *D) = pull((D[0] + dy, *D[1:]))
            d_h += dot("hbge,hged->hbd", d_rh.astype(R.dtype), R_T).astype(d_h.dtype)
            return _forget((d_h, *D), reset), (d_wx, d_rh)

        d_y = jnp.transpose(d_y, (1, 2, 0, 3)).astype(entering[0].dtype)
        steps = _steps(wx), rh, entering, reset.T, d_y
        D, (d_wx, d_rh) = lax.scan(step, _turned(d_state), steps, reverse=True)
        d_wx = jnp.transpose(d_wx, (2, 0, 1, 3, 4)).astype(wx.dtype)
        dR = dot("thbd,thbge->hdge", h, d_rh.astype(R.dtype)).astype(R.dtype)
        return (d_wx, None, dR, d_rh.sum((0, 2)).astype(bias.dtype)), _turned(D)


def _steps(wx):
    """[B, T, H, G, d] -> [T, H, B, G, d]"""
    return jnp.transpose(widen(wx), (1, 2, 0, 3, 4))


def _turned(state):
    """[B, H, d] each -> [H, B, d], and back"""
    return tuple(jnp.swapaxes(leaf, 0, 1) for leaf in state)


def _forget(state, reset):
    return tuple(jnp.where(reset[:, None], 0, leaf) for leaf in state)
