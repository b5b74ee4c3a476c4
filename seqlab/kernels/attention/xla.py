"""Softmax attention in blocks with an online softmax: T x S is never in memory.

FlashAttention-2 (Dao, 2023), algorithms 1 and 2: a loop over blocks of queries, in it one over the
blocks of keys in which something is visible. How many those are is known at run time only, so an
empty buffer, other documents and keys beyond the window cost nothing. Only y and the log-sum-exp
are kept for the gradient; scores are recomputed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.attention.visible import EMPTY, MASKED, visible, visible_blocks
from seqlab.kernels.kept import kept
from seqlab.kernels.on_tpu.tiles import LANES
from seqlab.kernels.platforms import Forms
from seqlab.kernels.precision import widen
from seqlab.kernels.soft_cap import soft_cap


class Options(NamedTuple):
    window: int | None
    sinks: int
    scale: float
    causal: bool = True
    cap: float | None = None

    @property
    def sight(self) -> dict[str, Any]:
        """Who sees whom, as `visible` takes it."""
        return {"window": self.window, "sinks": self.sinks, "causal": self.causal}

    def scores(self, products: jax.Array) -> jax.Array:
        """The scores of products q . k, before the mask."""
        return soft_cap(products * self.scale, self.cap)

    def slope(self, scores: jax.Array) -> jax.Array | float:
        """How fast these scores, not masked, grow with their products."""
        return self.scale if self.cap is None else self.scale * (1 - (scores / self.cap) ** 2)


class Queries(NamedTuple):
    """In blocks. The heads that share a key are further rows of its block: C = rows x heads."""

    q: jax.Array  # [N, B, G, C, K]
    at: jax.Array  # [2, N, B, C], position and document


class Keys(NamedTuple):
    """In blocks."""

    k: jax.Array  # [M, B, G, D, K]
    v: jax.Array  # [M, B, G, D, V]
    at: jax.Array  # [2, M, B, D], position and document


class Seen(NamedTuple):
    """What queries have seen of the keys that they met so far, before it is divided by `total`."""

    y: jax.Array  # [N, B, G, C, V], the sum of exp(score - top) v
    top: jax.Array  # [N, B, G, C], the largest score
    total: jax.Array  # [N, B, G, C], the sum of exp(score - top)


class Answered(NamedTuple):
    """Queries with what their gradient needs, once all keys have been seen."""

    q: jax.Array
    at: jax.Array
    lse: jax.Array  # [N, B, G, C]
    offset: jax.Array  # [N, B, G, C], see `answered`
    dy: jax.Array  # [N, B, G, C, V]


class Gradients(NamedTuple):
    """Sums so far, float32 or wider."""

    q_turned: jax.Array  # [N, B, G, K, C]
    k: jax.Array
    v: jax.Array


class Meeting(NamedTuple):
    """How queries meet keys: `see` and `pull`, or something that does the same with more keys."""

    see: Callable  # (options, queries, keys, seen) -> seen
    pull: Callable  # (options, answered, keys, gradients) -> gradients


def blockwise(
    q, k, v, q_position, q_document, k_position, k_document, *, block=None, forms=None, **options
):
    """The arguments of `attention`, and how many query rows and keys make a block, by default what
    suits the window; forms(options, queries, keys), if not this one, are what may do the work.
    Returns y and log-sum-exp."""
    options = Options(**options)
    rows, columns = block or block_for(options.window)
    queries = in_rows((q, q_position, q_document), k.shape[2], rows)
    keys = in_columns((k, v, k_position, k_document), columns)
    chosen = forms(options, queries, keys) if forms else Forms(InXLA(options, ALONE))
    return in_order(attend(chosen, queries, keys), q.shape[:3])


def in_rows(queries: tuple, G: int, rows: int) -> Queries:
    """q [B, T, H, K], position and document [B, T], for G key heads, in blocks of `rows`."""
    q, position, document = queries
    B, T, H, K = q.shape
    R, C = H // G, min(_tokens(rows, H // G), T)
    q = _blocks(q.reshape(B, T, G, R, K), C).transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, G, R * C, K)
    at = jnp.stack([_blocks(position, C), _blocks(document, C, fill=-1)])
    return Queries(q, jnp.tile(at, R))


def _tokens(rows: int, R: int) -> int:
    """How many tokens with R heads make about so many rows; those of a large block in whole
    registers, which TPU kernels need."""
    unit = LANES // math.gcd(R, LANES) if rows >= LANES else 1
    return max(rows // R // unit, 1) * unit


def in_columns(keys: tuple, columns: int) -> Keys:
    """k [B, S, G, K], v [B, S, G, V], position and document [B, S], in blocks of `columns`."""
    k, v, position, document = keys
    D = min(columns, k.shape[1])
    at = jnp.stack([_blocks(position, D), _blocks(document, D, fill=-1)])
    return Keys(_blocks(k, D).swapaxes(2, 3), _blocks(v, D).swapaxes(2, 3), at)


def in_order(outputs, shape: tuple[int, ...]):
    """y and log-sum-exp in blocks -> [B, T, H, V] and [B, T, H]"""
    (B, T, H), (y, lse) = shape, outputs
    G = y.shape[2]
    y, lse = (a.reshape(-1, B, G, H // G, a.shape[3] * G // H, *a.shape[4:]) for a in (y, lse))
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, y.shape[-1])
    return y[:, :T], lse.transpose(1, 0, 4, 2, 3).reshape(B, -1, H)[:, :T]


def block_for(window) -> tuple[int, int]:
    """On a CPU the best of 128 to 512 rows and keys at T = 2048; a narrow window wastes less of
    smaller ones."""
    return WIDE if window is None or window >= WIDE[0] else NARROW


WIDE, NARROW = (512, 256), (256, 128)


def _blocks(a, size, fill=0):
    """[B, T, ...] -> [N, B, size, ...], the last block filled up."""
    B, T = a.shape[:2]
    a = jnp.pad(a, [(0, 0), (0, -T % size)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
    return a.reshape(B, -1, size, *a.shape[2:]).swapaxes(0, 1)


class InXLA(NamedTuple):
    """Queries that meet keys as a form of `Forms`."""

    options: Options
    meeting: Meeting

    def forward(self, queries: Queries, keys: Keys, past: Keys | None):
        """y and log-sum-exp."""
        seen = nothing_seen(queries.q, keys.v)
        if past is not None:
            seen = see(self.options, queries, past, seen)
        return answer(self.meeting.see(self.options, queries, keys, seen), queries.q.dtype)

    def backward(self, queries: Queries, keys: Keys, past: Keys | None, y, lse, dy, dlse):
        """Cotangents of queries, keys and past."""
        done = answered(queries, y, lse, dy, dlse)
        d_past, zeros = None, zero_gradients(queries.q, keys)
        if past is not None:
            before = pull(self.options, done, past, zero_gradients(queries.q, past))
            d_past, zeros = (
                as_keys(before.k, before.v, past),
                zeros._replace(q_turned=before.q_turned),
            )
        d = self.meeting.pull(self.options, done, keys, zeros)
        return as_queries(d.q_turned.mT, queries), as_keys(d.k, d.v, keys), d_past


def attend(forms: Forms, queries: Queries, keys: Keys, past=None):
    """y and log-sum-exp [N, B, G, C, V] and [N, B, G, C] of queries that meet these keys, and
    before them those of `past`, if there are any, which are here whatever the meeting."""
    outputs: Any = _attend(forms, queries, keys, past)
    return outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(forms, queries, keys, past):
    return forms.call("forward", queries, keys, past)


def _forward(forms, queries, keys, past):
    outputs = kept(forms.call("forward", queries, keys, past))
    return outputs, (queries, keys, past, *outputs)


def _backward(forms, saved, cotangents):
    return forms.call("backward", *saved, *cotangents)


_attend.defvjp(_forward, _backward)


def as_queries(d, queries: Queries) -> Queries:
    return Queries(d.astype(queries.q.dtype), None)  # pyright: ignore


def as_keys(dk, dv, keys: Keys) -> Keys:
    return Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None)  # pyright: ignore


def nothing_seen(q, v) -> Seen:
    zero = widen(q[..., 0]) * 0  # [N, B, G, C], sharded and typed as q is
    return Seen(jnp.broadcast_to(zero[..., None], (*zero.shape, v.shape[-1])), zero + EMPTY, zero)


def answer(seen: Seen, dtype):
    """y and log-sum-exp; a query that saw nothing gets 0 and EMPTY."""
    total = jnp.where(seen.total > 0, seen.total, 1)
    return (seen.y / total[..., None]).astype(dtype), seen.top + jnp.log(total)


def answered(queries: Queries, y, lse, dy, dlse) -> Answered:
    # dscores = weights * (dweights - sum(dweights * weights) + dlse), and the sum is that of dy * y
    return Answered(*queries, lse, jnp.sum(widen(dy) * widen(y), -1) - dlse, dy)


def zero_gradients(q, keys: Keys) -> Gradients:
    return Gradients(*(widen(a) * 0 for a in (q.mT, keys.k, keys.v)))


# All products below are of plain row-major matrices, [M, K] by [K, N]: what has to be turned for
# that is turned once, outside the loop. Where XLA has to turn scores it takes twice as long.


def see(options: Options, queries: Queries, keys: Keys, seen: Seen) -> Seen:
    """What the queries have seen, and these keys too."""
    (q, q_at), (k, v, k_at) = queries, keys
    k_turned = k.mT

    def row(i, each_key, seen):
        def step(j, clear, carry):
            acc, top, total = carry
            products = _dot("bgtk,bgks->bgts", q_here, k_turned[j])
            scores = _masked(options, products, at, k_at[:, j][:, :, None], clear)
            highest = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - highest[..., None])
            shrink = jnp.exp(top - highest)
            total = shrink * total + weights.sum(-1)
            more = _dot("bgts,bgsv->bgtv", weights.astype(v.dtype), v[j])
            return shrink[..., None] * acc + more, highest, total

        q_here, at = q[i], q_at[:, i][..., None]
        new = each_key(step, tuple(a[i] for a in seen))
        return tuple(_put(a, i, b) for a, b in zip(seen, new, strict=True))

    return Seen(*_row_by_row(row, options, q_at, k_at, tuple(seen)))


def pull(options: Options, done: Answered, keys: Keys, gradients: Gradients) -> Gradients:
    """The gradients, and what these keys add to those of the queries and get themselves."""
    (q, q_at, lse, offset, dy), (k, v, k_at) = done, keys
    k_turned, turned = k.mT, (q, q.mT, dy, dy.mT)

    def row(i, each_key, carry):  # scores and what is like them stand as [keys, queries]
        def step(j, clear, carry):
            dq_turned, dk, dv = carry
            products = _dot("bgsk,bgkt->bgst", k[j], q_turned_here)
            weigh = lambda scores: jnp.exp(scores - lse_here)
            weights = _masked(options, products, at, k_at[:, j][..., None], clear, weigh)
            dweights = _dot("bgsv,bgvt->bgst", v[j], dy_turned_here)
            slope = options.slope(options.scores(products))
            dscores = weights * (dweights - offset_here) * slope
            dscores = dscores.astype(q.dtype)
            dv = _add(dv, j, _dot("bgst,bgtv->bgsv", weights.astype(dy.dtype), dy_here))
            dk = _add(dk, j, _dot("bgst,bgtk->bgsk", dscores, q_here))
            return dq_turned + _dot("bgks,bgst->bgkt", k_turned[j], dscores), dk, dv

        q_here, q_turned_here, dy_here, dy_turned_here = (a[i] for a in turned)
        at, lse_here, offset_here = (a[:, :, None] for a in (q_at[:, i], lse[i], offset[i]))
        dq_turned, dk, dv = carry
        dq_here, dk, dv = each_key(step, (dq_turned[i], dk, dv))
        return _put(dq_turned, i, dq_here), dk, dv

    return Gradients(*_row_by_row(row, options, q_at, k_at, tuple(gradients)))


ALONE = Meeting(see, pull)


def _row_by_row(row, options, q_at, k_at, carry):
    """carry = row(i, each_key, carry) over all query blocks i, where each_key(step, local) folds
    local = step(j, clear, local) over the key blocks j in which i sees something; in a clear pair,
    it sees everything. What is local to a row is read and written once, not for every pair."""
    some, every = visible_blocks(q_at, k_at, **options.sight)
    seen = jnp.argsort(~some, axis=1, stable=True)  # [N, M], those first that are seen
    number = jnp.sum(some, 1)

    def one(i, carry):
        def each_key(step, local):
            pair = lambda n, local: step(seen[i, n], every[i, seen[i, n]], local)
            return jax.lax.fori_loop(0, number[i], pair, local)

        return row(i, each_key, carry)

    return jax.lax.fori_loop(0, len(some), one, carry)


def _masked(options, products, q_at, k_at, clear, then=lambda scores: scores):
    """`then` of the scores of products [B, G, ...], which are MASKED where the query does not see
    the key; a clear pair needs no mask, which on a CPU costs more than the product."""

    def masked(products):
        sees = visible(*q_at, *k_at, **options.sight)
        return then(jnp.where(sees[:, None], options.scores(products), MASKED))

    return jax.lax.cond(clear, lambda products: then(options.scores(products)), masked, products)


def _put(a, i, b):
    return jax.lax.dynamic_update_index_in_dim(a, b, i, 0)  # `a.at[i].set` checks bounds


def _add(a, i, b):
    return _put(a, i, a[i] + b)


def _dot(pattern, a, b):
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
