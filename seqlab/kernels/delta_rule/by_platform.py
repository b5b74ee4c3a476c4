"""The fastest form for the platform that a program is lowered for, all under one gradient."""

from seqlab.kernels import platforms
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.delta_rule import pallas_gpu, pallas_tpu, xla
from seqlab.kernels.precision import widen


def by_platform(q, k, v, beta, log_decay, reset, state, *, chunk_size: int = 64):
    """The kernels where it is lowered for a TPU or a GPU, if they suit, and `xla` elsewhere."""
    tokens, size = (q, k, v, widen(beta), widen(log_decay), reset), chunk_length(q, chunk_size)
    on_tpu, on_gpu = pallas_tpu.form(tokens, state, size), pallas_gpu.form(tokens, size)
    return platforms.scan(platforms.Forms(xla.form(size), on_tpu, on_gpu), tokens, state)
