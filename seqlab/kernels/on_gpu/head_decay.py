"""One decay a head between the tokens of a chunk, on a GPU: see `kernels.head_decay`.

A program takes the heads that share their keys one after the other: what they share is read once,
and its gradient summed without a copy for every head.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqlab.kernels.on_gpu.chunks import Sizes, loop, place
from seqlab.kernels.on_gpu.couplings import Cotangents, Gradient, Prepared, through_states
from seqlab.kernels.on_gpu.states import Operands
from seqlab.kernels.tiles import columns_by_columns, places, product, rows_by_rows


def prepared(sizes: Sizes, q, k, log_decay, documents, erases: bool) -> Prepared:
    """log_decay: numbers; documents [B, N C], of which each chunk's first is 0"""
    numbers = jax.ShapeDtypeStruct(log_decay.shape, log_decay.dtype)
    square = (*log_decay.shape, sizes.size)
    out = {
        "start": numbers,
        "end": numbers,
        "whole": jax.ShapeDtypeStruct((sizes.B, sizes.H, sizes.chunks, sizes.K), numbers.dtype),
        "scores": jax.ShapeDtypeStruct(square, q.dtype),
        "overlaps": jax.ShapeDtypeStruct(square, numbers.dtype) if erases else None,
    }
    found = sizes.launch(
        head_scores,
        (1, sizes.chunks, sizes.B * sizes.G),
        {"q": q, "k": k, "log_decay": log_decay, "documents": documents},
        out,
        sizes=sizes,
    )
    overlaps = found.pop("overlaps")
    return Prepared(Operands(q, k, **found), overlaps, k, (q, k))


def head_scores(x, out, sizes: Sizes):
    group, heads = place(sizes, sizes.G), sizes.H // sizes.G
    group = group._replace(h=group.h * heads)
    q, k = group.tokens(x["q"]), group.tokens(x["k"])
    scores = rows_by_rows(q, k)
    overlaps = None if out["overlaps"] is None else rows_by_rows(k, k)

    def head(r, nothing):
        at = group._replace(h=group.h + r)
        decay = _Decays(at.numbers(x["log_decay"]), at.numbers(x["documents"]))
        at.put_numbers(out["start"], decay.start)
        at.put_numbers(out["end"], decay.end)
        at.put_whole(out["whole"], jnp.broadcast_to(decay.whole, (sizes.K,)))
        at.put_square(out["scores"], scores * decay.pairs)
        if overlaps is not None:
            at.put_square(out["overlaps"], jnp.where(decay.i > decay.j, overlaps * decay.pairs, 0))
        return nothing

    loop(heads, head, jnp.int32(0))


class _Decays:
    """log_decay, document [C]; sums are formed by additions only"""

    def __init__(self, log_decay, document):
        self.i, self.j = places(log_decay.shape[0])
        same, last = document[:, None] == document[None, :], jnp.max(document)
        self.sees, self.earlier = same & (self.i >= self.j), same & (self.i < self.j)
        after = jnp.cumsum(jnp.where(self.i > self.j, log_decay[:, None], 0), 0)  # in (j, i]
        masked = lambda seen, a: jnp.exp(jnp.where(seen, a, -jnp.inf))
        self.pairs = masked(self.sees, after)
        to_end = jnp.sum(jnp.where(self.i == log_decay.shape[0] - 1, after, 0), 0)
        self.start = masked(document == 0, jnp.cumsum(log_decay))
        self.end = masked(document == last, to_end)
        self.whole = masked(last == 0, jnp.sum(log_decay))


def gradient(sizes: Sizes, given: Prepared, x: Cotangents, log_decay, documents) -> Gradient:
    """Of pieces of K: what is not one a channel is to be added up."""
    chosen = sizes.blocks(head_gradient)
    rows, width = min(chosen.block[0], sizes.K), min(chosen.block[1], sizes.V)
    pieces = sizes.K // rows
    keys = jax.ShapeDtypeStruct(given.operands.k.shape, given.operands.k.dtype)
    numbers = jax.ShapeDtypeStruct((pieces, *log_decay.shape), log_decay.dtype)
    operands = given.operands._replace(scores=None)._asdict()
    found = sizes.launch(
        head_gradient,
        (pieces, sizes.chunks, sizes.B * sizes.G),
        {**operands, **x._asdict(), "log_decay": log_decay, "documents": documents},
        Gradient(keys, keys, numbers, None if x.u is None else numbers)._asdict(),
        sizes=sizes,
        rows=rows,
        width=width,
    )
    total = lambda a: None if a is None else jnp.sum(a, 0)
    return Gradient(found["q"], found["k"], total(found["log_decay"]), total(found["beta"]))


def head_gradient(x, out, sizes: Sizes, rows: int, width: int):
    group, heads = place(sizes, sizes.G), sizes.H // sizes.G
    piece, row = pl.program_id(0), pl.program_id(0) * rows
    group = group._replace(h=group.h * heads)
    q, k = group.tokens(x["q"], row, rows), group.tokens(x["k"], row, rows)

    def head(r, found):
        at = group._replace(h=group.h + r)
        decay = _Decays(at.numbers(x["log_decay"]), at.numbers(x["documents"]))
        start, end = decay.start[:, None], decay.end[:, None]
        read, write, known, passes = through_states(at, x, sizes, row, rows, width)
        read, write = start * read, end * write
        pairs = at.square(x["d_scores"]) * decay.pairs
        own = jnp.sum(jnp.where(decay.i == decay.j, pairs, 0), 1)[:, None]
        pairs = jnp.where(decay.i == decay.j, 0, pairs).astype(k.dtype)
        to_q, to_k = product(pairs, k), columns_by_columns(pairs, q)
        acts = q * (to_q + read) - k * to_k
        dk = to_k + own * q + write
        if known is not None:
            pairs, beta = at.square(x["d_overlaps"]) * decay.pairs, at.numbers(x["beta"])[:, None]
            as_row = product(pairs.astype(k.dtype), k) - start * known
            as_column = columns_by_columns((beta * pairs).astype(k.dtype), k)
            acts += k * (beta * as_row - as_column)
            dk += beta * as_row + as_column
            out["beta"][piece, at.b, at.h, at.chunk] = jnp.sum(k * as_row, 1)
        above = lambda seen, a: jnp.sum(jnp.where(seen, jnp.sum(a, 1)[:, None], 0), 0)
        collected = above(decay.sees, acts) + above(decay.earlier, k * write)
        out["log_decay"][piece, at.b, at.h, at.chunk] = collected + decay.whole * jnp.sum(passes)
        return found[0] + to_q + own * k + read, found[1] + dk

    nothing = jnp.zeros((sizes.size, rows), x["start"].dtype)
    dq, dk = loop(heads, head, (nothing, nothing))
    group.put_tokens(out["q"], dq, row)
    group.put_tokens(out["k"], dk, row)
