"""Softmax attention of one token over many keys, as a step of decoding has it.

All there is to it is reading keys and values once, as they lie in a state. Products head by head
would first move them, a head's tokens together. So the queries of all heads stand in one matrix,
each among zeros where the keys of other heads lie: G times as many multiplications, for free.
And the keys of the state and the token's own are never joined: only their scores are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from seqlab.kernels.attention.visible import EMPTY, MASKED, visible
from seqlab.kernels.soft_cap import soft_cap


def one_query(
    queries: tuple[jax.Array, ...],
    keys: Sequence[tuple[jax.Array, ...]],
    *,
    window: int | None,
    sinks: int,
    scale: float,
    cap: float | None = None,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """What `attention_with_lse` computes for T == 1; returns y and log-sum-exp.

    queries  q [B, 1, H, K] and its position and document
    keys     k, v, position, document; once or more, of any numbers of tokens
    """
    q, q_position, q_document = queries
    (B, _, H, K), (G, V) = q.shape, keys[0][1].shape[2:]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    own = jnp.repeat(jnp.eye(G, dtype=q.dtype), H // G, 0)  # [H, G], its key head
    spread = (q[:, 0, :, None] * own[..., None]).reshape(B, H, G * K)

    def scores(k, _, k_position, k_document):
        k = k.reshape(B, -1, G * K)
        scores = jnp.einsum("bsk,bhk->bhs", k, spread, preferred_element_type=wide)
        sees = visible(q_position, q_document, k_position, k_document, window, sinks, causal)
        return jnp.where(sees[:, None], soft_cap(scores * scale, cap), MASKED)

    def read(weights, v):
        v = v.reshape(B, -1, G * V)
        return jnp.einsum("bhs,bsv->bhv", weights.astype(v.dtype), v, preferred_element_type=wide)

    each = [scores(*some) for some in keys]
    lse = [jax.nn.logsumexp(some, -1) for some in each]
    lse = jnp.maximum(jax.nn.logsumexp(jnp.stack(lse), 0), EMPTY)  # [B, H]
    weights = [jnp.exp(some - lse[..., None]) for some in each]  # 0 where masked
    y = jnp.stack([read(w, v) for w, (_, v, *_) in zip(weights, keys, strict=True)]).sum(0)
    y = jnp.einsum("bhgv,hg->bhv", y.reshape(B, H, G, V), own.astype(wide))
    return y[:, None].astype(q.dtype), lse[:, None]
