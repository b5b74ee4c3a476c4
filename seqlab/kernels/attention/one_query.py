"""Softmax attention of one token over many keys, as a step of decoding has it.

All there is to it is reading keys and values once. So the keys of a head should lie together in
memory, as [B, G, S, K] has them: turned to [B, S, G, K] for the call, they are turned back at no
cost. And of a long state no more is read than is filled.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.attention.visible import EMPTY, MASKED, visible
from seqlab.kernels.soft_cap import soft_cap

SPAN = 256  # keys that are read at a time, where there are more


class Look(NamedTuple):
    """Who sees whom, and how."""

    window: int | None
    sinks: int
    causal: bool
    scale: float
    cap: float | None


class Query(NamedTuple):
    q: jax.Array  # [B, G, R, K], R = H // G heads with one key head
    position: jax.Array  # [B, 1]
    document: jax.Array  # [B, 1]


class Keys(NamedTuple):
    k: jax.Array  # [B, G, S, K]
    v: jax.Array  # [B, G, S, V]
    position: jax.Array  # [B, S]
    document: jax.Array  # [B, S]


class Seen(NamedTuple):
    y: jax.Array  # [B, G, R, V], float32 or wider
    lse: jax.Array  # [B, G, R], EMPTY where nothing is seen


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
    q, *at = queries
    (B, _, H, K), (G, V) = q.shape, keys[0][1].shape[2:]
    query = Query(q.reshape(B, G, H // G, K), *at)
    look = Look(window, sinks, causal, scale, cap)
    each = [Keys(k.swapaxes(1, 2), v.swapaxes(1, 2), *k_at) for k, v, *k_at in keys]
    some = lambda k: (_in_spans if k.k.shape[2] > SPAN else _seen)(look, query, k)
    y, lse = functools.reduce(_joined, map(some, each))
    return y.reshape(B, 1, H, V).astype(q.dtype), lse.reshape(B, 1, H)


def _seen(look: Look, query: Query, keys: Keys) -> Seen:
    wide = jnp.promote_types(query.q.dtype, jnp.float32)
    scores = jnp.einsum("bgrk,bgsk->bgrs", query.q, keys.k, preferred_element_type=wide)
    scores = soft_cap(scores * look.scale, look.cap)
    scores = jnp.where(_visible(look, query, keys)[:, None, None], scores, MASKED)
    lse = jnp.maximum(jax.nn.logsumexp(scores, -1), EMPTY)
    weights = jnp.exp(scores - lse[..., None]).astype(keys.v.dtype)  # 0 where masked
    y = jnp.einsum("bgrs,bgsv->bgrv", weights, keys.v, preferred_element_type=wide)
    return Seen(y, lse)


def _visible(look: Look, query: Query, keys: Keys) -> jax.Array:
    """[B, S]"""
    return visible(*query[1:], keys.position, keys.document, look.window, look.sinks, look.causal)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _in_spans(look: Look, query: Query, keys: Keys) -> Seen:
    """`_seen`, a span at a time as far as something is seen, if that is not most of it. How far is
    known at run time only, and such a loop has no gradient; that of `_seen` is its own."""
    S = keys.k.shape[2]
    seen = _visible(look, query, keys)
    end = jnp.max(jnp.where(seen, jnp.arange(1, S + 1, dtype=jnp.int32), 0))

    def span(i):
        some = lambda a: jax.lax.dynamic_slice_in_dim(a, i * SPAN, SPAN, -1 if a.ndim == 2 else 2)
        return _seen(look, query, Keys(*map(some, keys)))

    more = lambda i, seen: _joined(seen, span(i))
    spans = lambda: jax.lax.fori_loop(1, -(-end // SPAN), more, span(0))
    # a span is copied before it is read, and read by one core: no gain from half of the keys on
    return jax.lax.cond(2 * end < S, spans, lambda: _seen(look, query, keys))


@_in_spans.defjvp
def _in_spans_jvp(look, primals, tangents):
    return jax.jvp(functools.partial(_seen, look), primals, tangents)


def _joined(a: Seen, b: Seen) -> Seen:
    """What is seen of the keys of both."""
    lse = jnp.logaddexp(a.lse, b.lse)
    share = lambda seen: jnp.exp(seen.lse - lse)[..., None] * seen.y
    return Seen(share(a) + share(b), lse)
