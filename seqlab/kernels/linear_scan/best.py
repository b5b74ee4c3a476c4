"""What `implementation` None means: a form for each platform, under one gradient."""

import jax
import jax.numpy as jnp

from seqlab.kernels.linear_scan import gradient, pallas_tpu
from seqlab.kernels.linear_scan.planes import one_like
from seqlab.kernels.linear_scan.xla import masked
from seqlab.kernels.platforms import Forms
from seqlab.parallel.transitions import Diagonal


def by_platform(a, b, reset, state):
    """The definition's arguments and results: kernels where they suit, and `xla` elsewhere."""
    return gradient.scanned(a, b, reset, state, _forms(state))


def transition(a, b, reset) -> Diagonal:
    """What these tokens do to the state [B, ...] that enters them."""
    a, b = masked(a, b, reset)
    nothing = jax.tree.map(jnp.zeros_like, b)
    zero = jax.tree.map(lambda b: b[:, 0], nothing)
    _, decay = gradient.scan(_forms(zero), a, nothing, one_like(zero))  # pyright: ignore
    _, update = gradient.scan(_forms(zero), a, b, zero)  # pyright: ignore
    return Diagonal(decay, update)


def _forms(state) -> Forms:
    return Forms(gradient.IN_XLA, tpu=pallas_tpu.form(state))
