"""A matrix memory that decays, is written by an outer product and read by a query.

Serves linear attention, RetNet, GLA, HGRN2, Mamba-2 and, behind a max-plus scan, mLSTM; with the
read before the write, RWKV-6.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.decayed_outer_product import best, pallas_gpu, pallas_tpu, xla
from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence


@recurrence(
    xla=xla.chunked,
    pallas_tpu=pallas_tpu.chunked,
    pallas_gpu=pallas_gpu.chunked,
    best=best.by_platform,
    transition=xla.transition,
    apart=xla.apart,
)
def decayed_outer_product(
    q, k, v, log_decay, reset, state, *, chunk_size: int = 64, normaliser=False
):
    """S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T;  y_t = S_t^T q_t;  S_{t-1} = 0 where reset_t.

    q, k       [B, T, G, K]; value head h reads with query and key head h // (H / G)
    v          [B, T, H, V]
    log_decay  [B, T, H, 1], one decay a head, or [B, T, H, K], one a channel; <= 0, any strength
    reset      [B, T] bool, true where a new document starts
    state      [B, H, K, V] float32; [B, H, K, V + 1] with a normaliser
    chunk_size tokens per chunk of the chunked forms; the definition has no use for it
    normaliser carry n_t = exp(log_decay_t) * n_{t-1} + k_t too, as the last column of the state

    Returns y [B, T, H, V] in the dtype of v, or with a normaliser a pair of it and of n_t . q_t
    [B, T, H] float32, and the state after the last token.
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
        widen(xla.written(v, normaliser)),
        widen(log_decay),
    )
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (*wide, reset))
    state, y = lax.scan(step, state, tokens)
    return xla.read(jnp.moveaxis(y, 0, 1), v, normaliser), state


def read_before_write(q, k, v, log_decay, bonus, reset, state, **options):
    """y_t = (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t, with S_t as in `decayed_outer_product`.

    bonus [H, K] weighs a token's own key; the other arguments, and the options, are the same.
    Reading S_{t-1} with q_t is reading the state after token t - 1 with the query of the next.
    """
    after = jnp.concatenate([q[:, 1:], jnp.zeros_like(q[:, :1])], 1)
    y, left = decayed_outer_product(after, k, v, log_decay, reset, state, **options)
    wide = [jnp.repeat(widen(a), v.shape[2] // a.shape[2], 2) for a in (q, k)]  # [B, T, H, K]
    first = jnp.einsum("bhk,bhkv->bhv", wide[0][:, 0], state)[:, None].astype(v.dtype)
    read = jnp.where(reset[..., None, None], 0, jnp.concatenate([first, y[:, :-1]], 1))
    own = jnp.sum(wide[0] * bonus * wide[1], -1)[..., None] * widen(v)
    return (read + own).astype(v.dtype), left
