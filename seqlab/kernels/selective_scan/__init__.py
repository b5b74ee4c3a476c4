"""The selective state space of Mamba (S6; Gu & Dao, 2023): N decays and states a channel."""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence
from seqlab.kernels.selective_scan import best, pallas_gpu, pallas_tpu, xla


@recurrence(
    xla=xla.chunked,
    pallas_tpu=pallas_tpu.chunked,
    pallas_gpu=pallas_gpu.chunked,
    best=best.by_platform,
    transition=best.transition,
    weights=1,
)
def selective_scan(u, dt, b, c, reset, A, state, *, chunk_size: int = 64):
    """h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) b_t^T;  y_t = h_t c_t;  h_{t-1} = 0 where reset_t.

    u, dt       [B, T, E], dt >= 0
    b, c        [B, T, 1, N], shared by all channels
    reset       [B, T] bool, true where a new document starts
    A           [E, N], < 0, any strength
    state       [B, E, N] float32
    chunk_size  tokens per chunk of the chunked form; the definition has no use for it

    Returns y [B, T, E] in the dtype of u, and the state after the last token.
    """
    del chunk_size
    A = widen(A)

    def step(h, token):
        u, dt, b, c, reset = token
        h = jnp.where(reset[:, None, None], 0.0, h)
        h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * b
        return h, jnp.einsum("ben,bn->be", h, c[:, 0])

    tokens = jax.tree.map(
        lambda a: jnp.moveaxis(a, 1, 0), (widen(u), widen(dt), widen(b), widen(c), reset)
    )
    state, y = lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(u.dtype), state
