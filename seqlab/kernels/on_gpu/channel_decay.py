"""One decay a channel between the tokens of a chunk, on a GPU: see `kernels.halving`.

A chunk is cut in blocks of 16 tokens. Between two blocks a decay is split where the later one
begins; inside of a block, at the first border of halves that comes between the two tokens. So all
exponents are sums of gates, none is positive, and products are as large as a tensor core needs. In
the scan over chunks, queries and keys have their decays from and to the ends of the chunk in them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from seqlab.kernels.on_gpu.chunks import Place, Sizes, loop, place
from seqlab.kernels.on_gpu.couplings import Cotangents, Gradient, Prepared, through_states
from seqlab.kernels.on_gpu.products import chosen_sums
from seqlab.kernels.on_gpu.states import Operands
from seqlab.kernels.precision import widen
from seqlab.kernels.tiles import columns_by_columns, places, product, rows_by_rows

BLOCK = 16


# ---- queries and keys decayed from and to the ends of chunks ----


def prepared(sizes: Sizes, q, k, log_decay, documents, erases: bool) -> Prepared:
    """log_decay [B, T, H, K]; documents [B, N C], of which each chunk's first is 0"""
    wide = log_decay.dtype
    of = lambda *shape: jax.ShapeDtypeStruct((sizes.B, *shape), wide)
    tokens = jax.ShapeDtypeStruct((sizes.B, sizes.tokens, sizes.H, sizes.K), q.dtype)
    found = _launch(
        channel_operands,
        sizes,
        sizes.chunks,
        {"q": q, "k": k, "log_decay": log_decay, "documents": documents},
        {
            "q": tokens,
            "k": tokens,
            "reading": tokens if erases else None,
            "whole": of(sizes.H, sizes.chunks, sizes.K),
        },
    )
    square = (sizes.H, sizes.tokens, sizes.size)
    ones = jnp.ones((sizes.B, sizes.H, sizes.tokens), wide)
    scores = sizes.launch(
        channel_scores,
        (1, sizes.tokens // BLOCK, sizes.B * sizes.H),
        {"q": q, "k": k, "log_decay": log_decay, "documents": documents},
        {
            "scores": jax.ShapeDtypeStruct((sizes.B, *square), q.dtype),
            "overlaps": of(*square) if erases else None,
        },
        sizes=sizes,
    )
    operands = Operands(found["q"], found["k"], ones, ones, found["whole"], scores["scores"])
    return Prepared(operands, scores["overlaps"], found["reading"], (q, k))


def channel_operands(x, out, sizes: Sizes, rows: int):
    at, row = place(sizes), pl.program_id(0) * rows
    q, k = at.tokens(x["q"], row, rows), at.tokens(x["k"], row, rows)
    ends = _Ends.of(at.tokens(x["log_decay"], row, rows), at.numbers(x["documents"]))
    at.put_tokens(out["q"], q * ends.start, row)
    at.put_tokens(out["k"], k * ends.end, row)
    at.put_whole(out["whole"], ends.whole, row)
    if out["reading"] is not None:
        at.put_tokens(out["reading"], k * ends.start, row)


class _Ends(NamedTuple):
    """Decays of a chunk's tokens [C, rows] from its start and to its end; of all of it [rows]."""

    start: Any
    end: Any
    whole: Any

    @classmethod
    def of(cls, log_decay, document):
        i, j = places(len(document))
        last = jnp.max(document)
        masked = lambda seen, a: jnp.exp(jnp.where(seen, a, -jnp.inf))
        return cls(
            masked((document == 0)[:, None], chosen_sums(j <= i, log_decay)),
            masked((document == last)[:, None], chosen_sums(j > i, log_decay)),
            masked(last == 0, jnp.sum(log_decay, 0)),
        )


# ---- pairs of tokens ----


def channel_scores(x, out, sizes: Sizes):
    own, a = _Block.here(x, sizes, 0, sizes.K)
    kinds = {"scores": own.q, "overlaps": own.k}
    rows = {name: row for name, row in kinds.items() if out[name] is not None}
    upto = own.upto
    nothing = jnp.zeros((BLOCK, BLOCK), upto.dtype)

    def earlier(n, between):
        block = own.other(-1 - n)
        keys = block.keys(between)
        sees = own.document[:, None] == block.document[None, :]
        for name, row in rows.items():
            pairs = rows_by_rows((row * upto).astype(row.dtype), keys)
            own.at.put_block(out[name], jnp.where(sees, pairs, 0), a - 1 - n)
        return between * block.whole

    def unseen(n, nothing):
        for name in rows:
            own.at.put_block(out[name], nothing, a + 1 + n)
        return nothing

    loop(a, earlier, jnp.ones_like(own.whole))
    loop(sizes.size // BLOCK - 1 - a, unseen, nothing)
    i, j = places(BLOCK)
    sees = own.document[:, None] == own.document[None, :]
    for name, row in rows.items():
        here = jnp.where(i == j, jnp.sum(widen(row) * own.k, 1)[:, None], 0)
        for parts, decay in own.borders():
            across = rows_by_rows(*((y * decay).astype(y.dtype) for y in (row, own.k)))
            here += jnp.where(parts, across, 0)
        seen = sees if name == "scores" else sees & (i > j)
        own.at.put_block(out[name], jnp.where(seen, here, 0), a)


def channel_pairs(x, out, sizes: Sizes, rows: int):
    """What the scores of two different tokens add to gradients of queries and keys; and, without
    their beta, to those of keys that overlap with earlier ones."""
    row = pl.program_id(0) * rows
    own, a = _Block.here(x, sizes, row, rows)
    few, erases = own.k.dtype, x["d_overlaps"] is not None
    nothing = jnp.zeros((BLOCK, rows), x["log_decay"].dtype)

    def squares(block, column):
        """Of its rows and these columns: d scores, d overlaps, and these times beta."""
        dA = block.at.block(x["d_scores"], column)
        if not erases:
            return dA, None, None
        dM = block.at.block(x["d_overlaps"], column)
        return dA, dM, (block.at.numbers(x["beta"])[:, None] * dM).astype(few)

    def by_rows(dA, dM, keys):
        return product(dA, keys), product(dM, keys) if erases else nothing

    def by_columns(dA, dM, queries, keys):
        found = columns_by_columns(dA, queries)
        return found + columns_by_columns(dM, keys) if erases else found

    def earlier(n, found):
        between, to_q, as_row = found
        block = own.other(-1 - n)
        dA, dM, _ = squares(own, a - 1 - n)
        of_q, of_k = by_rows(dA, dM, block.keys(between))
        return between * block.whole, to_q + of_q, as_row + of_k

    def later(n, found):
        between, to_k = found
        block = own.other(1 + n)
        dA, _, dM = squares(block, a)
        queries = [(y * (block.upto * between)).astype(few) for y in (block.q, block.k)]
        return between * block.whole, to_k + by_columns(dA, dM, *queries)

    whole = jnp.ones_like(own.whole)
    _, to_q, as_row = loop(a, earlier, (whole, nothing, nothing))
    _, to_k = loop(sizes.size // BLOCK - 1 - a, later, (whole, nothing))
    to_q, as_row, to_k = own.upto * to_q, own.upto * as_row, own.after * to_k
    dA, dM, dM_beta = squares(own, a)
    for parts, decay in own.borders():
        masked = lambda d, parts=parts: None if d is None else jnp.where(parts, d, 0).astype(few)
        q, k = ((y * decay).astype(few) for y in (own.q, own.k))
        of_q, of_k = by_rows(masked(dA), masked(dM), k)
        to_q, as_row = to_q + decay * of_q, as_row + decay * of_k
        to_k += decay * by_columns(masked(dA), masked(dM_beta), q, k)
    for name, found in {"to_q": to_q, "to_k": to_k, "as_row": as_row}.items():
        if out[name] is not None:
            own.at.put_tokens(out[name], found, row)


class _Block(NamedTuple):
    """Sixteen tokens, some channels: decays up to each from the block's start, and after each."""

    x: Any
    at: Place
    row: Any
    q: Any  # [16, rows]
    k: Any
    log_decay: Any
    document: Any  # [16]

    @classmethod
    def here(cls, x, sizes: Sizes, row, rows: int):
        """The block of a program, and its number in its chunk."""
        at = place(sizes, size=BLOCK)
        return cls.of(x, at, row, rows), lax.rem(at.n, jnp.int32(sizes.size // BLOCK))

    @classmethod
    def of(cls, x, at: Place, row, rows: int):
        q, k, log_decay = (at.tokens(x[name], row, rows) for name in ("q", "k", "log_decay"))
        return cls(x, at, row, q, k, log_decay, at.numbers(x["documents"]))

    def other(self, distance):
        at = self.at._replace(n=self.at.n + distance)
        return _Block.of(self.x, at, self.row, self.k.shape[1])

    @property
    def upto(self):
        i, j = places(BLOCK)
        return jnp.exp(chosen_sums(j <= i, self.log_decay))

    @property
    def after(self):
        i, j = places(BLOCK)
        return jnp.exp(chosen_sums(j > i, self.log_decay))

    @property
    def whole(self):
        return jnp.exp(jnp.sum(self.log_decay, 0))

    def keys(self, between):
        """Decayed to the block's end, and over the blocks that follow."""
        return (self.k * (self.after * between)).astype(self.k.dtype)

    def borders(self):
        """For halves of 1, 2, 4 and 8 tokens: the pairs that their borders part, and the decays of
        tokens before a border to it, and of those behind it from it."""
        i, j = places(BLOCK)
        for s in (1, 2, 4, 8):
            to_border = jnp.where(i // s % 2 == 1, j <= i, j > i) & (i // s == j // s)
            parts = (i > j) & ((i ^ j) // s == 1)
            yield parts, jnp.exp(chosen_sums(to_border, self.log_decay))


# ---- gradients ----


def gradient(sizes: Sizes, given: Prepared, x: Cotangents, log_decay, documents) -> Gradient:
    """Of queries and keys that heads share: the sum over these."""
    q, k = given.queries_and_keys
    tokens = jax.ShapeDtypeStruct((sizes.B, sizes.tokens, sizes.H, sizes.K), log_decay.dtype)
    as_row = None if x.u is None else tokens
    inputs = {"q": q, "k": k, "log_decay": log_decay, "documents": documents, **x._asdict()}
    parts = {"to_q": tokens, "to_k": tokens, "as_row": as_row}
    parts = _launch(channel_pairs, sizes, sizes.tokens // BLOCK, inputs, parts)
    shared = sizes.G < sizes.H
    of_keys = jax.ShapeDtypeStruct(log_decay.shape, log_decay.dtype if shared else q.dtype)
    pieces = sizes.K // _rows(channel_gradient, sizes)
    numbers = (pieces, sizes.B, sizes.H, sizes.tokens)
    like = jax.ShapeDtypeStruct(log_decay.shape, log_decay.dtype)
    d_beta = None if x.u is None else jax.ShapeDtypeStruct(numbers, like.dtype)
    out = Gradient(of_keys, of_keys, like, d_beta)._asdict()
    found = Gradient(**_launch(channel_gradient, sizes, sizes.chunks, {**inputs, **parts}, out))

    def of_group(d, like):
        d = d.reshape(*like.shape[:3], -1, sizes.K).sum(3) if shared else d
        return d.astype(like.dtype)

    d_beta = None if x.u is None else jnp.sum(found.beta, 0)
    return Gradient(of_group(found.q, q), of_group(found.k, k), found.log_decay, d_beta)


def channel_gradient(x, out, sizes: Sizes, rows: int):
    at, piece, row = place(sizes), pl.program_id(0), pl.program_id(0) * rows
    some = lambda name: at.tokens(x[name], row, rows)
    document = at.numbers(x["documents"])
    ends = _Ends.of(some("log_decay"), document)
    width = min(rows, sizes.V)
    read, write, known, passes = through_states(at, x, sizes, row, rows, width)
    read, write = ends.start * read, ends.end * write
    i, j = places(sizes.size)
    own = jnp.sum(jnp.where(i == j, widen(at.square(x["d_scores"])), 0), 1)[:, None]
    q, k, to_q, to_k = map(some, ("q", "k", "to_q", "to_k"))
    acts, dk = q * (to_q + read) - k * to_k, to_k + own * q + write
    if known is not None:
        as_row, beta = some("as_row") - ends.start * known, at.numbers(x["beta"])[:, None]
        acts, dk = acts + k * (beta * as_row), dk + beta * as_row
        out["beta"][piece, at.b, at.h, at.chunk] = jnp.sum(k * as_row, 1)
    same = document[:, None] == document[None, :]
    collected = chosen_sums(same & (j >= i), acts) + chosen_sums(same & (j < i), k * write)
    at.put_tokens(out["log_decay"], collected + ends.whole * passes, row)
    at.put_tokens(out["q"], to_q + own * k + read, row)
    at.put_tokens(out["k"], dk, row)


def _rows(kernel, sizes: Sizes) -> int:
    """Channels of a program."""
    return min(sizes.blocks(kernel).block[0], sizes.K)


def _launch(kernel, sizes: Sizes, chunks: int, inputs, outputs):
    """On some channels of some tokens of every head."""
    rows = _rows(kernel, sizes)
    grid = (sizes.K // rows, chunks, sizes.B * sizes.H)
    return sizes.launch(kernel, grid, inputs, outputs, sizes=sizes, rows=rows)
