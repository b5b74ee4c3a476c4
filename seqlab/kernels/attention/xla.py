"""Softmax attention in blocks with an online softmax: T x S is never in memory.

FlashAttention-2 (Dao, 2023), algorithms 1 and 2, as one loop over the pairs of blocks in which
something is visible. The number of such pairs is known at run time only, so an empty buffer,
other documents and keys beyond the window cost nothing. Only y and the log-sum-exp are kept for
the gradient; scores are recomputed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.attention.visible import EMPTY, MASKED, visible, visible_blocks
from seqlab.kernels.precision import widen


class Options(NamedTuple):
    window: int | None
    sinks: int
    scale: float


def blockwise(
    q, k, v, q_position, q_document, k_position, k_document, *, window, sinks, scale, block=128
):
    """The arguments of `attention`; `block` tokens at a time. Returns y and log-sum-exp."""
    B, T, H, K = q.shape
    G, C, D = k.shape[2], min(block, T), min(block, k.shape[1])
    q = _blocks(q.reshape(B, T, G, H // G, K), C).transpose(0, 1, 3, 4, 2, 5)  # [N, B, G, R, C, K]
    k, v = _blocks(k, D).swapaxes(2, 3), _blocks(v, D).swapaxes(2, 3)  # [M, B, G, D, K or V]
    q_at = jnp.stack([_blocks(q_position, C), _blocks(q_document, C, fill=-1)])  # [2, N, B, C]
    k_at = jnp.stack([_blocks(k_position, D), _blocks(k_document, D, fill=-1)])
    outputs: Any = _attention(Options(window, sinks, scale), q, k, v, q_at, k_at)
    y, lse = outputs
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, y.shape[-1])
    return y[:, :T], lse.transpose(1, 0, 4, 2, 3).reshape(B, -1, H)[:, :T]


def _blocks(a, size, fill=0):
    """[B, T, ...] -> [N, B, size, ...], the last block filled up."""
    B, T = a.shape[:2]
    a = jnp.pad(a, [(0, 0), (0, -T % size)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
    return a.reshape(B, -1, size, *a.shape[2:]).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, q_at, k_at):
    return _forward(options, q, k, v, q_at, k_at)[0]


def _forward(options, q, k, v, q_at, k_at):
    def step(i, j, clear, carry):
        acc, top, total = (a[i] for a in carry)
        scores = _scores(options, q[i], k[j], q_at[:, i], k_at[:, j], clear)
        highest = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - highest[..., None])
        shrink = jnp.exp(top - highest)
        total = shrink * total + weights.sum(-1)
        seen = _dot("bgrts,bgsv->bgrtv", weights.astype(v.dtype), v[j])
        new = shrink[..., None] * acc + seen, highest, total
        return tuple(_put(a, i, b) for a, b in zip(carry, new, strict=True))

    zero = widen(q[..., 0]) * 0  # [N, B, G, R, C], sharded and typed as q is
    acc = jnp.broadcast_to(zero[..., None], (*zero.shape, v.shape[-1]))
    acc, top, total = _each_pair(step, options, q_at, k_at, (acc, zero + EMPTY, zero))
    total = jnp.where(total > 0, total, 1)  # a query that saw nothing: y = 0, log-sum-exp = EMPTY
    y, lse = (acc / total[..., None]).astype(q.dtype), top + jnp.log(total)
    return (y, lse), (q, k, v, q_at, k_at, y, lse)


def _backward(options, kept, cotangents):
    q, k, v, q_at, k_at, y, lse = kept
    dy, dlse = cotangents
    # dscores = weights * (dweights - sum(dweights * weights) + dlse), and the sum is that of dy * y
    offset = jnp.sum(widen(dy) * widen(y), -1) - dlse

    def step(i, j, clear, carry):
        dq, dk, dv = carry
        scores = _scores(options, q[i], k[j], q_at[:, i], k_at[:, j], clear)
        weights = jnp.exp(scores - lse[i][..., None])
        dweights = _dot("bgrtv,bgsv->bgrts", dy[i], v[j])
        dscores = (weights * (dweights - offset[i][..., None]) * options.scale).astype(q.dtype)
        dv = _add(dv, j, _dot("bgrts,bgrtv->bgsv", weights.astype(dy.dtype), dy[i]))
        dq = _add(dq, i, _dot("bgrts,bgsk->bgrtk", dscores, k[j]))
        dk = _add(dk, j, _dot("bgrts,bgrtk->bgsk", dscores, q[i]))
        return dq, dk, dv

    zeros = tuple(widen(a) * 0 for a in (q, k, v))
    grads = _each_pair(step, options, q_at, k_at, zeros)
    return *(g.astype(a.dtype) for g, a in zip(grads, (q, k, v), strict=True)), None, None


_attention.defvjp(_forward, _backward)


def _each_pair(step, options, q_at, k_at, carry):
    """carry = step(i, j, clear, carry) over the pairs of query block i and key block j in which
    something is visible; in a clear pair, everything is."""
    some, every = visible_blocks(q_at, k_at, options.window, options.sinks)
    i, j = jnp.nonzero(some, size=some.size, fill_value=0)
    clear = every[i, j]
    pair = lambda n, carry: step(i[n], j[n], clear[n], carry)
    return jax.lax.fori_loop(0, jnp.sum(some), pair, carry)


def _scores(options, q, k, q_at, k_at, clear):
    """[B, G, R, C, D], MASKED where the query does not see the key; a clear pair needs no mask,
    which on a CPU costs more than the product."""

    def masked(scores):
        (q_position, q_document), (k_position, k_document) = q_at[..., None], k_at[:, :, None]
        sees = visible(q_position, q_document, k_position, k_document, *options[:2])
        return jnp.where(sees[:, None, None], scores, MASKED)

    scores = _dot("bgrtk,bgsk->bgrts", q, k) * options.scale
    return jax.lax.cond(clear, lambda scores: scores, masked, scores)


def _put(a, i, b):
    return jax.lax.dynamic_update_index_in_dim(a, b, i, 0)  # `a.at[i].set` checks bounds


def _add(a, i, b):
    return _put(a, i, a[i] + b)


def _dot(pattern, a, b):
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
