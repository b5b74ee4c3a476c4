"""A matrix memory that decays, is written by an outer product and read by a query.

Serves linear attention, RetNet, GLA, HGRN2, Mamba-2 and, behind a max-plus scan, mLSTM.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.decayed_outer_product import xla
from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence


@recurrence(xla=xla.chunked, transition=xla.transition)
def decayed_outer_product(q, k, v, log_decay, reset, state, *, chunk_size: int = 64):
    """S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T;  y_t = S_t^T q_t;  S_{t-1} = 0 where reset_t.

    q, k       [B, T, G, K]; value head h reads with query and key head h // (H / G)
    v          [B, T, H, V]
    log_decay  [B, T, H, 1], one decay a head, or [B, T, H, K], one a channel; <= 0, any strength
    reset      [B, T] bool, true where a new document starts
    state      [B, H, K, V] float32
    chunk_size tokens per chunk of the chunked forms; the definition has no use for it

    Returns y [B, T, H, V] in the dtype of v, and the state after the last token.
    """
    del chunk_size
    repeat = v.shape[2] // q.shape[2]

    def step(S, token):
        q, k, v, log_decay, reset = token
        S = jnp.where(reset[:, None, None, None], 0.0, S)
        S = jnp.exp(log_decay)[..., None] * S + k[..., None] * v[..., None, :]
        return S, jnp.einsum("bhk,bhkv->bhv", q, S)

    wide = (
        jnp.repeat(widen(q), repeat, 2),
        jnp.repeat(widen(k), repeat, 2),
        widen(v),
        widen(log_decay),
    )
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (*wide, reset))
    state, y = lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state
