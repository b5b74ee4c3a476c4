"""The recurrence as GPU kernels: a program walks in time with some rows of one head.

It has that head's block of R on the chip from the first step to the last, in registers or shared
memory as the compiler decides, and the states of its rows in registers (Pöppel et al., 2024). Rows
are at least 16, the least that a matrix unit takes. Products that all tokens can share stay with
XLA: what R says to the gates in the backward pass, and dR (see `xla`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.fused_rnn import cells, xla
from seqlab.kernels.fused_rnn.gpu_kernels import backward, forward
from seqlab.kernels.on_gpu import blocks, trust, tuning
from seqlab.kernels.on_gpu.blocks import Blocks
from seqlab.kernels.on_gpu.call import call
from seqlab.kernels.precision import dot, widen

LEAST, MOST_BYTES = 16, 128 * 2**10  # channels of a head, and bytes of its block of R


def scanned(wx, reset, R, bias, state, *, cell, interpret: bool = False):
    """The definition's arguments and results; `interpret` runs it on any machine."""
    if not interpret and not _suits(R):
        raise ModelError(
            f"The GPU kernel of fused_rnn takes heads whose width is a power of two, {LEAST} or "
            f"more, with R of at most {MOST_BYTES} bytes each, not {R.dtype}{list(R.shape)}: leave "
            "the implementation to None."
        )
    form = OnGPU(cell, _blocks(R), interpret)
    return platforms.scan(platforms.Forms(form), (wx, reset, R, bias), tuple(state))


def form(tokens, cell) -> "OnGPU | None":
    """The kernels, unless they do not suit or are not to be trusted on the GPU here."""
    wx, _, R, _ = tokens
    if not _suits(R) or not trust.trusted("fused_rnn", R.dtype):
        return None
    return OnGPU(cell, _blocks(R))


def _suits(R) -> bool:
    d, bytes_of_head = R.shape[1], R.size // R.shape[0] * R.dtype.itemsize
    return d >= LEAST and d & (d - 1) == 0 and bytes_of_head <= MOST_BYTES


def _blocks(R) -> Blocks:
    return blocks.chosen("fused_rnn", f"d={R.shape[1]}")


class OnGPU(NamedTuple):
    """The kernels as a form of `platforms.scan`; see `xla.InXLA` for what it keeps. `blocks.block`
    are the rows of a program."""

    cell: Callable
    blocks: Blocks
    interpret: bool = False

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def _forward(self, tokens, state, keep: bool):
        wx, leaves = tokens[0], len(state)
        lies, wide = _Lies.of(wx, self.blocks), state[0].dtype
        y = jax.ShapeDtypeStruct((*wx.shape[:2], lies.H * lies.d), wx.dtype)
        before = jax.ShapeDtypeStruct((lies.T, lies.H, lies.B, lies.d), wide)
        inputs = [*lies.tokens(tokens), *map(lies.state, state)]
        outputs = [lies.rows(y), *map(lies.state, state), *[lies.before(before)] * (leaves * keep)]
        y, *rest = self._call(forward, lies, inputs, outputs, leaves)
        return (y.reshape(*wx.shape[:3], -1), tuple(rest[:leaves])), tuple(rest[leaves:])

    def backward(self, tokens, entering, d_y, d_state):
        wx, reset, R, bias = tokens
        lies, h = _Lies.of(wx, self.blocks), entering[0].astype(R.dtype)
        rh = dot("thbd,hdge->thbge", h, R) + bias[:, None]
        inputs = [*lies.tokens((wx, reset, R)), lies.before(_flat(rh, 3))]
        inputs += [*map(lies.before, entering), lies.rows(_flat(d_y, 2))]
        inputs += map(lies.state, d_state)
        outputs = [inputs[0], lies.before(_flat(rh, 3)), *map(lies.state, d_state)]
        d_wx, d_rh, *D = self._call(backward, lies, inputs, outputs, len(d_state))
        d_rh = d_rh.reshape(rh.shape)
        dR = dot("thbd,thbge->hdge", h, d_rh.astype(R.dtype)).astype(R.dtype)
        d_bias = d_rh.sum((0, 2)).astype(bias.dtype)
        return (d_wx.reshape(wx.shape), None, dR, d_bias), tuple(D)

    def _call(self, kernel, lies: "_Lies", inputs, outputs, leaves: int):
        return call(
            functools.partial(kernel, cell=self.cell, lies=lies, leaves=leaves),
            (lies.H, pl.cdiv(lies.B, lies.m)),
            inputs,
            [(jax.ShapeDtypeStruct(a.shape, a.dtype), block) for a, block in outputs],
            self.blocks,
            name=f"fused_rnn_{kernel.__name__}",
            interpret=self.interpret,
        )


class _Lies(NamedTuple):
    """Arrays, their gates side by side, and their blocks for program (h, p), which has m of B rows
    of head h."""

    B: int
    T: int
    H: int
    G: int
    d: int
    m: int

    @classmethod
    def of(cls, wx, sizes: Blocks) -> "_Lies":
        return cls(*wx.shape, *sizes.block)

    def tokens(self, tokens) -> list:
        wx, reset, *weights = tokens
        resets = pl.BlockSpec((self.m, self.T), lambda h, p: (p, 0))
        weights = [_flat(a, a.ndim - 2) for a in weights]
        return [
            self.rows(_flat(wx, 2)),
            (reset.astype(jnp.int32), resets),
            *((a, pl.BlockSpec((None, *a.shape[1:]), self._of_head(a))) for a in weights),
        ]

    def _of_head(self, a):
        return lambda h, p: (h, *[0] * (a.ndim - 1))

    def rows(self, a) -> tuple:
        """[B, T, H X]"""
        return a, pl.BlockSpec((self.m, self.T, a.shape[2] // self.H), lambda h, p: (p, 0, h))

    def state(self, a) -> tuple:
        """[B, H, d]"""
        return a, pl.BlockSpec((self.m, None, self.d), lambda h, p: (p, h, 0))

    def before(self, a) -> tuple:
        """[T, H, B, X]"""
        return a, pl.BlockSpec((self.T, None, self.m, a.shape[3]), lambda h, p: (0, h, p, 0))


def _flat(a, axis: int):
    """Without the axes from this one on but a last."""
    return a.reshape(*a.shape[:axis], -1)


# ---- what they are tried and measured on ----


@trust.trial_of("fused_rnn")
def trial(dtype) -> trust.Trial:
    """y and the last h, whose gradients are smooth: those of the exponent m jump where it does."""
    kernel, in_xla = (functools.partial(f, cell=cells.slstm) for f in (scanned, xla.scanned))
    read = lambda results: (results[0], results[1][0])
    return trust.Trial(kernel, in_xla, _arguments(3, 40, 2, 32, dtype), read)


@tuning.contests_of("fused_rnn")
def contests() -> list[tuning.Contest]:
    """sLSTM layers 1,024 wide, forward and backward."""

    def contest(d):
        args = _arguments(64, 512, 1024 // d, d, jnp.bfloat16)

        def run(sizes: Blocks):
            def loss(wx, R, bias):
                tokens, forms = (wx, args[1], R, bias), platforms.Forms(OnGPU(cells.slstm, sizes))
                results: Any = platforms.scan(forms, tokens, args[4])
                return jnp.sum(widen(results[0]))

            return jax.grad(loss, (0, 1, 2))

        each = tuple(Blocks((m,), warps) for m in (16, 32) for warps in (2, 4, 8, 16))
        return tuning.Contest(f"d={d}", run, (args[0], *args[2:4]), each)

    return [contest(d) for d in (32, 64, 128)]


def _arguments(B: int, T: int, H: int, d: int, dtype) -> tuple:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    R, reset = (normal(H, d, 4, d) * d**-0.5).astype(dtype), rng.random((B, T)) < 0.02
    state = (normal(B, H, d), normal(B, H, d), np.abs(normal(B, H, d)) + 1, normal(B, H, d))
    return normal(B, T, H, 4, d).astype(dtype), reset, R, normal(H, 4, d), state
