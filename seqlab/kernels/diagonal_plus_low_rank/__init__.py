"""A matrix memory whose transition is diagonal plus rank one: RWKV-7 (Peng et al., 2025).

The delta rule is the case a = -exp(log_decay) k, b = beta k; here what is removed, what is written
and the decay are independent of each other.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.diagonal_plus_low_rank import pallas_tpu, xla
from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence


@recurrence(
    xla=xla.chunked,
    pallas_tpu=pallas_tpu.chunked,
    transition=xla.transition,
    best=pallas_tpu.by_platform,
)
def diagonal_plus_low_rank(q, k, v, a, b, log_decay, reset, state, *, chunk_size: int = 64):
    """S_t = exp(log_decay_t) * S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T;  y_t = S_t^T q_t;
    S_{t-1} = 0 where reset_t. What a reads has not decayed yet.

    q, k, a, b [B, T, H, K]. |a| |b| near 1 or less keeps the memory bounded
    v          [B, T, H, V]
    log_decay  [B, T, H, K] or [B, T, H, 1]; <= 0, any strength
    reset      [B, T] bool, true where a new document starts
    state      [B, H, K, V] float32
    chunk_size tokens per chunk of the chunked forms; the definition has no use for it

    Returns y [B, T, H, V] in the dtype of v, and the state after the last token.
    """
    del chunk_size

    def step(S, token):
        q, k, v, a, b, log_decay, reset = token
        S = jnp.where(reset[:, None, None, None], 0.0, S)
        read = jnp.einsum("bhk,bhkv->bhv", a, S)
        S = jnp.exp(log_decay)[..., None] * S
        S += b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
        return S, jnp.einsum("bhk,bhkv->bhv", q, S)

    tokens = (*map(widen, (q, k, v, a, b, log_decay)), reset)
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens)
    state, y = lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state
