"""What `implementation` None means: a form for each platform, under one gradient."""

from seqlab.kernels import platforms
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.decayed_outer_product import pallas_gpu, pallas_tpu, xla
from seqlab.kernels.precision import widen


def by_platform(q, k, v, log_decay, reset, state, *, chunk_size: int = 64, normaliser=False):
    """The definition's arguments and results: kernels where they suit, and `xla` elsewhere."""
    tokens, size = (q, k, v, widen(log_decay), reset), chunk_length(q, chunk_size)
    forms = platforms.Forms(
        xla.form(v, size, normaliser),
        tpu=pallas_tpu.form(tokens, state, size, normaliser),
        gpu=pallas_gpu.form(tokens, size),
    )
    return platforms.scan(forms, tokens, state)
