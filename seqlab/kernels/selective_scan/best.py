"""What `implementation` None means: a form for each platform, under one gradient."""

import jax.numpy as jnp

from seqlab.kernels import platforms
from seqlab.kernels.precision import widen
from seqlab.kernels.selective_scan import pallas_gpu, pallas_tpu, xla
from seqlab.parallel.transitions import Diagonal


def by_platform(u, dt, b, c, reset, A, state, *, chunk_size: int = 64):
    """The definition's arguments and results: kernels where they suit, and `xla` elsewhere."""
    tokens = xla.prepared(u, dt, b, c, reset, A)
    forms = platforms.Forms(
        xla.form(u, chunk_size),
        tpu=pallas_tpu.form(tokens, chunk_size),
        gpu=pallas_gpu.form(tokens, chunk_size),
    )
    y, state = platforms.scan(forms, tokens, state.mT)  # pyright: ignore
    return y, state.mT


def transition(u, dt, b, c, reset, A, *, chunk_size: int = 64) -> Diagonal:
    """What these tokens do to the state [B, E, N] that enters them."""
    whole = jnp.exp(jnp.sum(widen(dt), 1)[..., None] * widen(A))
    decay = jnp.where(jnp.any(reset, 1)[:, None, None], 0, whole)
    empty = jnp.zeros_like(whole)
    return Diagonal(decay, by_platform(u, dt, b, c, reset, A, empty, chunk_size=chunk_size)[1])
