"""Softmax attention over keys of several documents: causal or not, sliding window, sinks, grouped
heads.

`attention` is what to call; `definition` is what it computes. Papers: Vaswani et al. (2017);
grouped-query heads, Ainslie et al. (2023); sinks, Xiao et al. (2023, StreamingLLM);
capped scores, Gemma Team (2024, Gemma 2).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqlab.errors import ConfigError, nearest
from seqlab.kernels.attention import pallas_tpu
from seqlab.kernels.attention.across_devices import (
    across_devices,
    each_device,
    heads_are_split,
    time_is_split,
)
from seqlab.kernels.attention.one_query import one_query
from seqlab.kernels.attention.visible import EMPTY, MASKED, visible
from seqlab.kernels.attention.xla import Options, blockwise
from seqlab.kernels.soft_cap import soft_cap

__all__ = ["EMPTY", "attention", "attention_with_lse", "definition"]


def attention(*arrays: jax.Array, **options: Any) -> jax.Array:
    """The y of `attention_with_lse`, which says what the arguments are."""
    return attention_with_lse(*arrays, **options)[0]


def attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_position: jax.Array,
    q_document: jax.Array,
    k_position: jax.Array,
    k_document: jax.Array,
    *,
    past: tuple[jax.Array, ...] | None = None,
    window: int | None = None,
    sinks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    cap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = sum_s softmax_s(scale * q_t . k_s) v_s over the keys s that query t sees.

    q                       [B, T, H, K]; query head h reads key head h // (H // G)
    k, v                    [B, S, G, K], [B, S, G, V], in the dtype of q
    q_position, k_position  [B, T], [B, S] int32, index within the document
    q_document, k_document  [B, T], [B, S] int32; -1 is an empty slot, seen by nobody
    past                    k, v, position, document of more keys, of any number and dtype: those
                            that a state keeps
    window, sinks           a key is seen by queries of its own document, if fewer than `window`
                            tokens away or among the first `sinks`
    causal                  and only by those that do not come before it
    scale, cap              K ** -0.5 unless given; scores become cap * tanh(score / cap) if given
    implementation          "reference", "xla" or "pallas_tpu"; None is the kernels where it is
                            lowered for a TPU and they suit, and "xla" elsewhere. All but the
                            reference have a form of their own for T == 1

    Where the ambient mesh splits time, queries meet keys as `use_mesh(attention=...)` says
    (`across_devices`), while `past` is whole on every device; the reference is left to XLA.

    Returns y [B, T, H, V] in the dtype of q, and the log-sum-exp of the scores [B, T, H], float32
    or wider. A query that sees nothing gives 0, with log-sum-exp `EMPTY`.
    Raises ConfigError if H is not a multiple of G, the implementation is unknown, or heads cannot
    be split as the mesh says, and ModelError if a kernel that was named does not suit.
    """
    _check(q.shape[2], k.shape[2], implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"window": window, "sinks": sinks, "causal": causal, "scale": scale, "cap": cap}
    queries, keys = (q, q_position, q_document), (k, v, k_position, k_document)
    if past is not None:
        past = tuple(a.astype(b.dtype) for a, b in zip(past, keys, strict=True))
    by_hand = implementation != "reference"
    if by_hand and q.shape[1] == 1:
        return one_query(queries, [keys] if past is None else [past, keys], **options)
    if by_hand and time_is_split(q, k):
        return across_devices(queries, keys, past, Options(**options))
    if past is not None:
        keys = tuple(jnp.concatenate(pair, 1) for pair in zip(past, keys, strict=True))
    run = functools.partial(IMPLEMENTATIONS[implementation], **options)
    if by_hand and heads_are_split(q):
        return each_device(run, queries, keys)
    k, v, *k_at = keys
    return run(q, k, v, *queries[1:], *k_at)


def _check(heads: int, key_heads: int, implementation: str | None) -> None:
    if heads % key_heads:
        raise ConfigError(f"{heads} query heads cannot share {key_heads} key-value heads.")
    if implementation is not None and implementation not in NAMED:
        raise ConfigError(
            f"attention has no implementation {implementation!r}: " + nearest(implementation, NAMED)
        )


def definition(
    q, k, v, *at, window, sinks, scale, cap=None, causal=True
) -> tuple[jax.Array, jax.Array]:
    """What `attention` computes, with all T x S scores at once; returns y and log-sum-exp."""
    q_position, q_document, k_position, k_document = at
    (B, T, H, K), G = q.shape, k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=wide)
    scores = soft_cap(scores * scale, cap)
    queries = q_position[..., None], q_document[..., None]
    sees = visible(*queries, k_position[:, None], k_document[:, None], window, sinks, causal)
    scores = jnp.where(sees[:, None, None], scores, MASKED)
    lse = jnp.maximum(jax.nn.logsumexp(scores, -1), EMPTY)  # [B, G, R, T]
    weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)  # 0 where masked
    y = jnp.einsum("bgrts,bsgv->btgrv", weights, v, preferred_element_type=wide)
    lse = lse.transpose(0, 3, 1, 2).reshape(B, T, H)
    return y.reshape(B, T, H, v.shape[-1]).astype(q.dtype), lse


NAMED = {"reference": definition, "xla": blockwise, "pallas_tpu": pallas_tpu.kernel}
IMPLEMENTATIONS = {None: pallas_tpu.by_platform, **NAMED}
