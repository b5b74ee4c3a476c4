"""An elementwise linear recurrence, real or complex.

Serves RG-LRU, S5, minGRU, minLSTM, HGRN and, behind a max-plus scan, attention read as a
recurrence.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.linear_scan import best, gradient, pallas_tpu
from seqlab.kernels.linear_scan.planes import Complex
from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence
from seqlab.parallel.transitions import Diagonal

__all__ = ["Complex", "linear_scan"]


@recurrence(
    xla=gradient.scanned,
    pallas_tpu=pallas_tpu.scanned,
    best=best.by_platform,
    transition=best.transition,
)
def linear_scan(a, b, reset, state):
    """h_t = a_t * h_{t-1} + b_t, each number for itself;  h_{t-1} = 0 where reset_t.

    a, b   [B, T, E, ...], real arrays of one shape, or both `Complex`
    reset  [B, T] bool, true where a new document starts
    state  [B, E, ...] float32, or Complex of these

    Returns every h [B, T, E, ...] in the dtype of b, and the last as it was given.
    """

    def step(h, token):
        a, b, reset = token
        first = lambda h: reset.reshape(-1, *[1] * (h.ndim - 1))
        h = jax.tree.map(lambda h: jnp.where(first(h), 0, h), h)
        h = Diagonal(a, b)(h)
        return h, h

    wide = jax.tree.map(widen, (a, b))
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (*wide, reset))
    last, h = lax.scan(step, state, tokens)
    return jax.tree.map(lambda h, b: jnp.moveaxis(h, 0, 1).astype(b.dtype), h, b), last
