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
from seqlab.kernels.kept import kept
from seqlab.kernels.precision import widen


class Options(NamedTuple):
    window: int | None
    sinks: int
    scale: float


def blockwise(q, k, v, q_position, q_document, k_position, k_document, *, block=None, **options):
    """The arguments of `attention`, and how many query rows and keys make a block, by default what
    suits the window. Returns y and log-sum-exp."""
    (B, T, H, K), G = q.shape, k.shape[2]
    options, R = Options(**options), H // G
    rows, keys = block or _block(options.window)
    C, D = min(max(rows // R, 1), T), min(keys, k.shape[1])
    # the heads that share a key are further rows of its block: [N, B, G, R * C, K]
    q = _blocks(q.reshape(B, T, G, R, K), C).transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, G, R * C, K)
    k, v = _blocks(k, D).swapaxes(2, 3), _blocks(v, D).swapaxes(2, 3)  # [M, B, G, D, K or V]
    q_at = jnp.stack([_blocks(q_position, C), _blocks(q_document, C, fill=-1)])
    q_at = jnp.tile(q_at, R)  # [2, N, B, R * C]
    k_at = jnp.stack([_blocks(k_position, D), _blocks(k_document, D, fill=-1)])  # [2, M, B, D]
    outputs: Any = _attention(options, q, k, v, q_at, k_at)
    y, lse = (a.reshape(-1, B, G, R, C, *a.shape[4:]) for a in outputs)
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, y.shape[-1])
    return y[:, :T], lse.transpose(1, 0, 4, 2, 3).reshape(B, -1, H)[:, :T]


def _block(window) -> tuple[int, int]:
    """On a CPU the best of 128 to 512 rows and keys at T = 2048; a narrow window wastes less of
    smaller ones."""
    return (512, 256) if window is None or window >= 512 else (256, 128)


def _blocks(a, size, fill=0):
    """[B, T, ...] -> [N, B, size, ...], the last block filled up."""
    B, T = a.shape[:2]
    a = jnp.pad(a, [(0, 0), (0, -T % size)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
    return a.reshape(B, -1, size, *a.shape[2:]).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, q_at, k_at):
    return _forward(options, q, k, v, q_at, k_at)[0]


# All products below are of plain row-major matrices, [M, K] by [K, N]: what has to be turned for
# that is turned once, outside the loop. Where XLA has to turn scores it takes twice as long.


def _forward(options, q, k, v, q_at, k_at):
    k_turned = k.mT

    def step(i, j, clear, carry):
        acc, top, total = (a[i] for a in carry)
        scores = _dot("bgtk,bgks->bgts", q[i], k_turned[j]) * options.scale
        at = q_at[:, i][..., None], k_at[:, j][:, :, None]
        scores = _masked(options, scores, *at, clear)
        highest = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - highest[..., None])
        shrink = jnp.exp(top - highest)
        total = shrink * total + weights.sum(-1)
        seen = _dot("bgts,bgsv->bgtv", weights.astype(v.dtype), v[j])
        new = shrink[..., None] * acc + seen, highest, total
        return tuple(_put(a, i, b) for a, b in zip(carry, new, strict=True))

    zero = widen(q[..., 0]) * 0  # [N, B, G, C], sharded and typed as q is
    acc = jnp.broadcast_to(zero[..., None], (*zero.shape, v.shape[-1]))
    acc, top, total = _each_pair(step, options, q_at, k_at, (acc, zero + EMPTY, zero))
    total = jnp.where(total > 0, total, 1)  # a query that saw nothing: y = 0, log-sum-exp = EMPTY
    y, lse = kept(((acc / total[..., None]).astype(q.dtype), top + jnp.log(total)))
    return (y, lse), (q, k, v, q_at, k_at, y, lse)


def _backward(options, kept, cotangents):
    q, k, v, q_at, k_at, y, lse = kept
    dy, dlse = cotangents
    # dscores = weights * (dweights - sum(dweights * weights) + dlse), and the sum is that of dy * y
    offset = jnp.sum(widen(dy) * widen(y), -1) - dlse
    q_turned, dy_turned, k_turned = q.mT, dy.mT, k.mT

    def step(i, j, clear, carry):  # scores and what is like them stand as [keys, queries]
        dq_turned, dk, dv = carry
        scores = _dot("bgsk,bgkt->bgst", k[j], q_turned[i]) * options.scale
        at = q_at[:, i][:, :, None], k_at[:, j][..., None]
        scores = _masked(options, scores, *at, clear)
        weights = jnp.exp(scores - lse[i][:, :, None])
        dweights = _dot("bgsv,bgvt->bgst", v[j], dy_turned[i])
        dscores = (weights * (dweights - offset[i][:, :, None]) * options.scale).astype(q.dtype)
        dv = _add(dv, j, _dot("bgst,bgtv->bgsv", weights.astype(dy.dtype), dy[i]))
        dk = _add(dk, j, _dot("bgst,bgtk->bgsk", dscores, q[i]))
        dq_turned = _add(dq_turned, i, _dot("bgks,bgst->bgkt", k_turned[j], dscores))
        return dq_turned, dk, dv

    zeros = tuple(widen(a) * 0 for a in (q_turned, k, v))
    dq_turned, dk, dv = _each_pair(step, options, q_at, k_at, zeros)
    grads = dq_turned.mT, dk, dv
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


def _masked(options, scores, q_at, k_at, clear):
    """Scores [B, G, ...] -> MASKED where the query does not see the key; a clear pair needs no
    mask, which on a CPU costs more than the product."""

    def masked(scores):
        sees = visible(*q_at, *k_at, *options[:2])
        return jnp.where(sees[:, None], scores, MASKED)

    return jax.lax.cond(clear, lambda scores: scores, masked, scores)


def _put(a, i, b):
    return jax.lax.dynamic_update_index_in_dim(a, b, i, 0)  # `a.at[i].set` checks bounds


def _add(a, i, b):
    return _put(a, i, a[i] + b)


def _dot(pattern, a, b):
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
