"""The chunked form as GPU kernels: see `on_gpu.chunk_scan`."""

from seqlab.kernels import platforms
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.delta_rule import xla
from seqlab.kernels.on_gpu import chunk_scan, trust
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


@trust.trial_of(NAME)
def trial(dtype) -> trust.Trial:
    return trust.Trial(chunked, xla.chunked, chunk_scan.tokens_to_try(dtype, channels=False))


@trust.trial_of(NAME + chunk_scan.OF_CHANNELS)
def trial_of_channels(dtype) -> trust.Trial:
    return trust.Trial(chunked, xla.chunked, chunk_scan.tokens_to_try(dtype, channels=True))
