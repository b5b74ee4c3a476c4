"""A matrix memory that decays and is corrected: a key's old value is replaced, not added to.

Serves DeltaNet (no decay), Gated DeltaNet (one decay a head) and Kimi Delta Attention (one a
channel).
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.delta_rule import best, pallas_gpu, pallas_tpu, xla
from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence


@recurrence(
    xla=xla.chunked,
    pallas_tpu=pallas_tpu.chunked,
    pallas_gpu=pallas_gpu.chunked,
    best=best.by_platform,
    transition=xla.transition,
)
def delta_rule(q, k, v, beta, log_decay, reset, state, *, chunk_size: int = 64):
    """S = exp(log_decay_t) * S_{t-1};  S_t = S + k_t (beta_t (v_t - S^T k_t))^T;  y_t = S_t^T q_t;
    S_{t-1} = 0 where reset_t.

    q, k       [B, T, G, K]; value head h reads with query and key head h // (H / G). Keys of length
               at most 1 (or beta k^2 <= 2) keep the memory bounded
    v          [B, T, H, V]
    beta       [B, T, H], how much of the old value is replaced; in (1, 2) the memory along the key
               changes its sign (negative eigenvalues, Grazzi et al., 2024)
    log_decay  [B, T, H, 1], one decay a head, or [B, T, H, K], one a channel; <= 0, any strength
    reset      [B, T] bool, true where a new document starts
    state      [B, H, K, V] float32
    chunk_size tokens per chunk of the chunked forms; the definition has no use for it

    Returns y [B, T, H, V] in the dtype of v, and the state after the last token.
    """
    del chunk_size
    repeat = v.shape[2] // q.shape[2]

    def step(S, token):
        q, k, v, beta, log_decay, reset = token
        S = jnp.where(reset[:, None, None, None], 0.0, S)
        S = jnp.exp(log_decay)[..., None] * S
        error = v - jnp.einsum("bhk,bhkv->bhv", k, S)
        S = S + k[..., None] * (beta[..., None] * error)[..., None, :]
        return S, jnp.einsum("bhk,bhkv->bhv", q, S)

    q, k = (jnp.repeat(widen(a), repeat, 2) for a in (q, k))
    tokens = (q, k, widen(v), widen(beta), widen(log_decay), reset)
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens)
    state, y = lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state
