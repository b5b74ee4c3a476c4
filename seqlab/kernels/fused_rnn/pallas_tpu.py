"""The recurrence as TPU kernels: time is a loop inside, R and the state stay in the vector memory.

The grid is (groups of heads, blocks of rows, chunks of time), and chunks follow one another. A step
of all rows of a block is one product with R, which loads it anew: so a block takes as many rows as
there is room for. See `layout_tpu` for how arrays lie.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.fused_rnn import kernels_tpu
from seqlab.kernels.fused_rnn.layout_tpu import Lies, apart, beside, blocks_of, heads_of
from seqlab.kernels.on_tpu.call import call


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


class Alike(NamedTuple):
    """A form for another platform that keeps narrow heads side by side, as the kernels do."""

    form: Any

    def run(self, tokens, state):
        return self.form.run(tokens, state)

    def keeping(self, tokens, state):
        results, before = self.form.keeping(tokens, state)
        return results, tuple(beside(leaf, heads_of(tokens[0])) for leaf in before)

    def backward(self, tokens, entering, d_y, d_state):
        before = tuple(apart(leaf, heads_of(tokens[0])) for leaf in entering)
        return self.form.backward(tokens, before, d_y, d_state)


class OnTPU(NamedTuple):
    """The kernels as a form of `platforms.scan`; see `xla.InXLA` for what it keeps."""

    cell: Callable
    interpret: Any = False

    def alike(self, form):
        return Alike(form)

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def _forward(self, tokens, state, keep: bool):
        lies = Lies(tokens, state, backward=False)
        wx, given, n = tokens[0], lies.state(state), len(state)
        blocks, wide, shape = lies.blocks, state[0].dtype, jax.ShapeDtypeStruct
        y = shape((blocks.B, blocks.T, blocks.H * blocks.d), wx.dtype)
        kept = [shape((blocks.T, *a.shape), wide) for a in given * keep]
        y, *rest = call(
            functools.partial(kernels_tpu.forward, blocks=blocks, cell=self.cell, leaves=n),
            blocks.grid,
            [*lies.tokens(tokens), *((a, lies.of_state) for a in given)],
            [(y, lies.of_tokens(1)), *((a, lies.of_before) for a in kept)]
            + [(shape(a.shape, wide), lies.of_state) for a in given],
            [lies.turned(blocks.G, wide), lies.turned(1, wide)],
            semantics=("parallel", "parallel", "arbitrary"),
            cost=lies.cost(functools.partial(kernels_tpu.step, self.cell, blocks), tokens, n),
            name="fused_rnn_forward",
            interpret=self.interpret,
        )
        y = y.reshape(*wx.shape[:3], blocks.d)
        return (y, lies.restored(rest[-n:])), tuple(rest[:-n]) if keep else None

    def backward(self, tokens, entering, d_y, d_state):
        lies = Lies(tokens, d_state, backward=True)
        wx, _, R, bias = tokens
        blocks, wide, n = lies.blocks, d_state[0].dtype, len(d_state)
        (flat, _), _, (R_flat, of_R), (bias_flat, of_bias) = lies.tokens(tokens)
        of_wx, shape = lies.of_tokens(blocks.G), jax.ShapeDtypeStruct
        given = lies.state(d_state)
        d_wx, dR, d_bias, *D = call(
            functools.partial(kernels_tpu.backward, blocks=blocks, cell=self.cell, leaves=n),
            blocks.grid,
            [*lies.tokens(tokens), *((a, lies.of_before) for a in entering)]
            + [(d_y.reshape(*d_y.shape[:2], -1), lies.of_tokens(1))]
            + [(a, lies.of_state) for a in given],
            [(shape(flat.shape, wx.dtype), of_wx), (shape(R_flat.shape, wide), of_R)]
            + [(shape(bias_flat.shape, wide), of_bias)]
            + [(shape(a.shape, wide), lies.of_state) for a in given],
            [lies.turned(blocks.G, wide), lies.turned(blocks.G, wide), lies.turned(1, wide)],
            semantics=("parallel", "arbitrary", "arbitrary"),
            cost=lies.cost(functools.partial(kernels_tpu.step_back, self.cell, blocks), tokens, n),
            name="fused_rnn_backward",
            interpret=self.interpret,
        )
        like = lambda d, a: d.reshape(a.shape).astype(a.dtype)
        return (like(d_wx, wx), None, like(dR, R), like(d_bias, bias)), lies.restored(D)
