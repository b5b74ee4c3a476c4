"""The selective scan as a pair of TPU kernels: see `tpu_kernels` for what they do."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.on_tpu.call import VMEM, call
from seqlab.kernels.on_tpu.tiles import LANES
from seqlab.kernels.precision import widen
from seqlab.kernels.selective_scan import tpu_kernels, xla
from seqlab.kernels.selective_scan.tpu_kernels import SUBLANES

WIDTHS = (512, 256, 128)  # channels of a block
ROWS = 16  # of a tile of bfloat16
SEMANTICS = ("parallel", "arbitrary", "arbitrary")


def chunked(u, dt, b, c, reset, A, state, *, chunk_size: int = 64, interpret: Any = False):
    """The definition's arguments and results; `pltpu.InterpretParams()` runs it on any machine."""
    tokens = xla.prepared(u, dt, b, c, reset, A)
    on_tpu = form(tokens, chunk_size, interpret)
    if on_tpu is None:
        raise ModelError(
            f"The TPU kernel of selective_scan takes multiples of {LANES} channels, of {SUBLANES} "
            f"states and of {ROWS} tokens a chunk, as its memory holds them, not A {A.shape} and "
            f"chunk_size={chunk_size}: leave the implementation to None."
        )
    y, state = platforms.scan(platforms.Forms(on_tpu), tokens, state.mT)  # pyright: ignore
    return y, state.mT


def form(tokens, chunk_size: int, interpret: Any = False) -> "OnTPU | None":
    """The kernels for tokens as `xla.prepared` gives them; None where they do not suit."""
    u, A = tokens[0], tokens[-1]
    (T, E), N = u.shape[1:], A.shape[0]
    if E % LANES or N % SUBLANES or (chunk_size < T and chunk_size % ROWS):
        return None
    fits = Plan.of(u, A, chunk_size, backward=True).memory <= VMEM
    return OnTPU(chunk_size, interpret) if fits else None


class OnTPU(NamedTuple):
    """The kernels as a form of `platforms.scan`."""

    chunk_size: int
    interpret: Any = False

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def _forward(self, tokens, state, keep: bool):
        u, A = tokens[0], tokens[-1]
        plan = Plan.of(u, A, self.chunk_size, backward=False)
        _, states = plan.states(state.dtype)
        y, *entering, last = call(
            functools.partial(tpu_kernels.forward, plan=plan),
            plan.grid,
            [*plan.laid(*tokens), (state, states)],
            [plan.like(u), *([plan.kept(state.dtype)] if keep else []), plan.states(state.dtype)],
            [*plan.rows(3, state.dtype), *plan.spread(2, state.dtype)],
            semantics=SEMANTICS,
            cost=plan.cost(1, state.dtype),
            name="selective_scan_forward",
            interpret=self.interpret,
        )
        return (y[:, : u.shape[1]], last), (entering[0] if keep else None)

    def backward(self, tokens, entering, d_y, d_state):
        u, dt, b, c, _, A = tokens
        plan, dtype = Plan.of(u, A, self.chunk_size, backward=True), d_state.dtype
        kept, states = plan.kept(dtype), plan.states(dtype)
        du, ddt, db, dc, dA, d_first = call(
            functools.partial(tpu_kernels.backward, plan=plan),
            plan.grid,
            [*plan.laid(*tokens), (entering, kept[1]), plan.wide(d_y), (d_state, states[1])],
            [plan.like(u), plan.like(dt), *[plan.sums(dtype)] * 2, states, states],
            [
                *plan.rows(5, dtype),
                *plan.spread(4, dtype),
                pltpu.VMEM((plan.size, plan.N, plan.width), dtype),
            ],
            semantics=SEMANTICS,
            cost=plan.cost(2, dtype),
            name="selective_scan_backward",
            interpret=self.interpret,
        )
        cut = lambda d, a: d[:, : a.shape[1]].astype(a.dtype)
        d_each = (d.reshape(plan.B, -1, plan.N) for d in (db, dc))
        db, dc = map(cut, d_each, (b, c))
        return (cut(du, u), cut(ddt, dt), db, dc, None, jnp.sum(dA, 0)), d_first


class Plan(NamedTuple):
    """How B sequences of T tokens in E channels of N states are cut, and how they lie."""

    B: int
    T: int
    E: int
    N: int
    size: int  # tokens of a chunk
    width: int  # channels of a block
    backward: bool

    @classmethod
    def of(cls, u, A, chunk_size: int, backward: bool) -> "Plan":
        B, T, E = u.shape
        width = next(width for width in WIDTHS if E % width == 0)
        size = chunk_size if chunk_size < T else -(-T // ROWS) * ROWS
        return cls(B, T, E, A.shape[0], size, width, backward)

    @property
    def chunks(self) -> int:
        return -(-self.T // self.size)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.B, self.chunks, self.E // self.width

    @property
    def memory(self) -> int:
        """Bytes of the vector memory, about, for the backward pass in float32."""
        block, states = self.size * self.width, self.N * self.E
        spread = 4 * self.size * self.N * LANES
        return 4 * (15 * block + self.N * block + spread + 9 * states)

    def time(self, chunk):
        return self.chunks - 1 - chunk if self.backward else chunk

    def laid(self, u, dt, b, c, reset, A) -> list:
        """Each as it lies, and the block of it that a step takes."""
        first = reset[..., None].astype(jnp.float32)
        rates = A, pl.BlockSpec(A.shape, lambda b, c, e: (0, 0))
        shared = map(self.shared, (widen(b), widen(c), first))
        return [self.wide(u), self.wide(dt), *shared, rates]

    def wide(self, a) -> tuple:
        """The same of [B, T, E], a block at least."""
        return jnp.pad(a, [(0, 0), (0, max(0, self.size - self.T)), (0, 0)]), self.block

    def like(self, a) -> tuple:
        """The same of a result like this one, which is still to be made."""
        shape = self.B, max(self.size, self.T), self.E
        return jax.ShapeDtypeStruct(shape, a.dtype), self.block

    @property
    def block(self) -> pl.BlockSpec:
        index = lambda b, c, e: (b, self.time(c), e)
        return pl.BlockSpec((None, self.size, self.width), index)

    def shared(self, a) -> tuple:
        """The same of what all channels share [B, T, X]: a chunk is [X, C]."""
        a = jnp.pad(a, [(0, 0), (0, -self.T % self.size), (0, 0)])
        a = a.reshape(self.B, self.chunks, self.size, -1).mT
        index = lambda b, c, e: (b, self.time(c), 0, 0)
        return a, pl.BlockSpec((None, None, *a.shape[2:]), index)

    def states(self, dtype) -> tuple:
        """States of all channels, which stay for all chunks."""
        shape = jax.ShapeDtypeStruct((self.B, self.N, self.E), dtype)
        return shape, pl.BlockSpec((None, self.N, self.E), lambda b, c, e: (b, 0, 0))

    def kept(self, dtype) -> tuple:
        """The states that enter the chunks."""
        shape = jax.ShapeDtypeStruct((self.chunks, self.B, self.N, self.E), dtype)
        index = lambda b, c, e: (self.time(c), b, 0, e)
        return shape, pl.BlockSpec((None, None, self.N, self.width), index)

    def sums(self, dtype) -> tuple:
        """A chunk's sums over channels: N numbers a token, one token after the other."""
        row = 1, self.size * self.N
        shape = jax.ShapeDtypeStruct((self.B, self.chunks, *row), dtype)
        return shape, pl.BlockSpec((None, None, *row), lambda b, c, e: (b, self.time(c), 0, 0))

    def rows(self, count: int, dtype) -> list:
        """Room for a row a token."""
        return [pltpu.VMEM((self.size, self.width), dtype)] * count

    def spread(self, count: int, dtype) -> list:
        """Room for what a token has for all channels, or adds up over them."""
        return [pltpu.VMEM((self.size, self.N, LANES), dtype)] * count

    def cost(self, passes: int, dtype) -> tuple:
        """One exponential a state, a token and a pass."""
        decays = jax.ShapeDtypeStruct((passes * self.size, self.N, self.E), dtype)
        return jnp.exp, [decays], self.B * self.chunks
