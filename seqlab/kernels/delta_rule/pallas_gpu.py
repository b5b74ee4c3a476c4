"""The chunked form as GPU kernels: see `on_gpu.chunk_scan`."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from seqlab.kernels import platforms
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.delta_rule import xla
from seqlab.kernels.on_gpu import chunk_scan, trust, tuning
from seqlab.kernels.on_gpu.blocks import ANY, Blocks
from seqlab.kernels.precision import widen

NAME = "delta_rule"


def chunked(q, k, v, beta, log_decay, reset, state, *, chunk_size: int = 64, interpret=False):
    """The definition's arguments and results; with `interpret` on any machine."""
    tokens, size = (q, k, v, widen(beta), widen(log_decay), reset), chunk_length(q, chunk_size)
    chunk_scan.require(NAME, tokens, size)
    return platforms.scan(platforms.Forms(chunk_scan.OnGPU(size, interpret)), tokens, state)


def form(tokens, size: int) -> chunk_scan.OnGPU | None:
    """The kernels, if they suit the tokens and are to be believed on the GPU at hand."""
    return chunk_scan.OnGPU(size) if chunk_scan.usable(NAME, tokens, size) else None


@trust.trial_of(NAME, chunk_scan.DTYPES)
def trial(dtype) -> trust.Trial:
    return trust.Trial(chunked, xla.chunked, chunk_scan.tokens_to_try(dtype, channels=False))


@trust.trial_of(NAME + chunk_scan.OF_CHANNELS, chunk_scan.DTYPES)
def trial_of_channels(dtype) -> trust.Trial:
    return trust.Trial(chunked, xla.chunked, chunk_scan.tokens_to_try(dtype, channels=True))


def contests(kernel: str) -> list[tuning.Contest]:
    """A layer of Gated DeltaNet or of Kimi Delta Attention, forward and backward."""
    sizes = {"B": 8, "T": 4096, "G": 16, "H": 16, "K": 128}
    *tokens, state = chunk_scan.tokens_to_try(jnp.bfloat16, kernel.startswith("channel"), **sizes)

    def run(blocks: Blocks):
        forms = platforms.Forms(chunk_scan.OnGPU(64, others=((kernel, blocks),)))

        def loss(q, k, v, *others):
            results: Any = platforms.scan(forms, (q, k, v, *others[:-1]), others[-1])
            return jnp.sum(widen(results[0]))

        return jax.grad(loss, (0, 1, 2, 3, 4, 6))

    pieces, warps, stages = (32, 64, 128), (2, 4, 8), (1, 2, 3)
    each = itertools.starmap(Blocks, itertools.product(((n, n) for n in pieces), warps, stages))
    return [tuning.Contest(ANY, run, (*tokens, state), tuple(each))]


for kernel in chunk_scan.KERNELS:  # those of the outer product among them
    tuning.contests_of(kernel)(functools.partial(contests, kernel))
