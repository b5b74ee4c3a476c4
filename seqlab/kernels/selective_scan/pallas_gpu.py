"""The selective scan as GPU kernels: a program walks in time with the states of some channels.

A program has the states [N, e] of e channels of one sequence in its registers; decays and states
[B, T, E, N] are nowhere else. The forward pass writes the states that enter each chunk. The
backward pass, of a chunk, walks forward and writes those that enter each group of some tokens to
memory that the next chunk uses again; then it walks back and makes the states of a group again, all
at once in registers (Gu & Dao, 2023, section 3.3.2, do so in the fast memory of a GPU).

Each program writes its own share of what is summed over channels or sequences. Shares are added
afterwards, so that results are the same to the bit in every run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.on_gpu import blocks, trust, tuning
from seqlab.kernels.on_gpu.blocks import Blocks
from seqlab.kernels.on_gpu.call import call
from seqlab.kernels.precision import widen
from seqlab.kernels.selective_scan import xla
from seqlab.kernels.selective_scan.gpu_kernels import Walk, backward, forward

FEW_STATES, MOST_STATES = 16, 64  # of a channel: more would not fit the registers


def chunked(u, dt, b, c, reset, A, state, *, chunk_size: int = 64, interpret: bool = False):
    """The definition's arguments and results; `interpret` runs it on any machine."""
    tokens = xla.prepared(u, dt, b, c, reset, A)
    if not _suits(tokens):
        raise ModelError(
            f"The GPU kernel of selective_scan takes at most {MOST_STATES} states a channel, not "
            f"{A.shape[1]}: leave the implementation to None."
        )
    form = OnGPU(min(chunk_size, u.shape[1]), _blocks(tokens), interpret)
    y, state = platforms.scan(platforms.Forms(form), tokens, state.mT)  # pyright: ignore
    return y, state.mT


def form(tokens, chunk_size: int) -> "OnGPU | None":
    """The kernels, of the tokens that `xla.prepared` returns, unless they do not suit or are not
    to be trusted on the GPU here."""
    u = tokens[0]
    if not _suits(tokens) or not trust.trusted("selective_scan", u.dtype):
        return None
    return OnGPU(min(chunk_size, u.shape[1]), _blocks(tokens))


class OnGPU(NamedTuple):
    """The kernels as a form of `platforms.scan`, of the tokens that `xla.prepared` returns and a
    state [B, N, E]. `blocks.block` are e and the tokens of a group."""

    size: int  # of a chunk
    blocks: Blocks
    interpret: bool = False

    def run(self, tokens, state):
        return tuple(self._forward(tokens, state, keep=False))

    def keeping(self, tokens, state):
        y, last, entering = self._forward(tokens, state, keep=True)
        return (y, last), entering

    def backward(self, tokens, entering, d_y, d_state):
        u, dt, b, c, _, A = tokens
        walk, wide = self._walk(tokens), d_state.dtype
        shares = walk.shares(jax.ShapeDtypeStruct((walk.programs, *b.shape), wide))
        between = jax.ShapeDtypeStruct((walk.groups, *d_state.shape), wide)
        given = [walk.of_channels(d_y), walk.of_state(d_state)]
        found = [walk.of_channels(u), walk.of_channels(dt), shares, shares]
        found += [walk.of_state(d_state), walk.of_state(d_state), walk.of_states(between)]
        inputs = [*walk.of_tokens(tokens), walk.of_states(entering), *given]
        du, ddt, db, dc, dA, d_state, _ = self._call(backward, walk, inputs, found)
        total = lambda d, like: jnp.sum(d, 0).astype(like.dtype)
        return (du, ddt, total(db, b), total(dc, c), None, total(dA, A)), d_state

    def _forward(self, tokens, state, keep: bool):
        walk = self._walk(tokens)
        entering = jax.ShapeDtypeStruct((walk.chunks, *state.shape), state.dtype)
        outputs = [walk.of_channels(tokens[0]), walk.of_state(state), walk.of_states(entering)]
        inputs = [*walk.of_tokens(tokens), walk.of_state(state)]
        return self._call(forward, walk, inputs, outputs[: 2 + keep])

    def _walk(self, tokens) -> Walk:
        return Walk.of(tokens, self.size, *self.blocks.block, self.interpret)

    def _call(self, kernel, walk: Walk, inputs, outputs):
        return call(
            functools.partial(kernel, walk),
            (walk.B, walk.programs),
            inputs,
            [(jax.ShapeDtypeStruct(a.shape, a.dtype), block) for a, block in outputs],
            self.blocks,
            name=f"selective_scan_{kernel.__name__}",
            interpret=self.interpret,
        )


def _suits(tokens) -> bool:
    return tokens[-1].shape[0] <= MOST_STATES


def _blocks(tokens) -> Blocks:
    many = tokens[-1].shape[0] > FEW_STATES
    return blocks.chosen("selective_scan", "many states" if many else blocks.ANY)


# ---- what they are tried and measured on ----


@trust.trial_of("selective_scan")
def trial(dtype) -> trust.Trial:
    return trust.Trial(chunked, xla.chunked, _arguments(2, 150, 80, 16, dtype))


@tuning.contests_of("selective_scan")
def contests() -> list[tuning.Contest]:
    """A layer of Mamba 1.4B, forward and backward."""
    args = _arguments(8, 2048, 4096, 16, jnp.bfloat16)

    def run(sizes: Blocks):
        def loss(*args):
            tokens, state = xla.prepared(*args[:-1]), args[-1].mT
            results: Any = platforms.scan(platforms.Forms(OnGPU(64, sizes)), tokens, state)
            return jnp.sum(widen(results[0]))

        return jax.grad(loss, (0, 1, 2, 3, 5))

    each = [Blocks((e, group), warps) for e in (16, 32, 64) for group in (2, 4) for warps in (1, 2)]
    return [tuning.Contest(blocks.ANY, run, args, tuple(each))]


def _arguments(B: int, T: int, E: int, N: int, dtype) -> tuple:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    few = lambda *shape: normal(*shape).astype(dtype)
    dt, reset = np.abs(normal(B, T, E)) * 0.1, rng.random((B, T)) < 0.02
    A = -np.broadcast_to(np.arange(1, N + 1, dtype=np.float32), (E, N))
    return few(B, T, E), dt, few(B, T, 1, N), few(B, T, 1, N), reset, A, normal(B, E, N)
