"""The chunked form as GPU kernels: see `on_gpu.chunk_scan`."""

import functools

import jax.numpy as jnp

from seqlab.kernels import platforms
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.decayed_outer_product import xla
from seqlab.kernels.on_gpu import chunk_scan, trust
from seqlab.kernels.precision import widen

NAME = "decayed_outer_product"


def chunked(q, k, v, log_decay, reset, state, *, chunk_size=64, normaliser=False, interpret=False):
    """The definition's arguments and results; with `interpret` on any machine."""
    del normaliser  # which the state tells
    tokens, size = (q, k, v, widen(log_decay), reset), chunk_length(q, chunk_size)
    chunk_scan.require(NAME, tokens, size)
    return platforms.scan(platforms.Forms(chunk_scan.OnGPU(size, interpret)), tokens, state)


def form(tokens, size: int) -> chunk_scan.OnGPU | None:
    """The kernels, if they suit the tokens and are to be believed on the GPU at hand."""
    return chunk_scan.OnGPU(size) if chunk_scan.usable(NAME, tokens, size) else None


@trust.trial_of(NAME, chunk_scan.DTYPES)
def trial(dtype) -> trust.Trial:
    """With a normaliser."""
    q, k, v, _, log_decay, reset, state = chunk_scan.tokens_to_try(dtype, channels=False)
    state = jnp.pad(state, [(0, 0)] * 3 + [(0, 1)])
    kernel, in_xla = (functools.partial(f, normaliser=True) for f in (chunked, xla.chunked))
    return trust.Trial(kernel, in_xla, (q, k, v, log_decay, reset, state))


@trust.trial_of(NAME + chunk_scan.OF_CHANNELS, chunk_scan.DTYPES)
def trial_of_channels(dtype) -> trust.Trial:
    q, k, v, _, *others = chunk_scan.tokens_to_try(dtype, channels=True)
    return trust.Trial(chunked, xla.chunked, (q, k, v, *others))
