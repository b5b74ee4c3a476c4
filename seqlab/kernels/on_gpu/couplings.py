"""What gradients of a scan over chunks have in common, whatever its decays, on a GPU.

With dw and D of `states`, T = (I + M)^-1 of the delta rule and u the cotangent of what it solves:

    dA = dy w^T     u = T^T dw     dM = -u w^T     dv = beta u     d beta = u . v + ...
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.on_gpu.chunks import Place, Sizes, loop, place
from seqlab.kernels.on_gpu.products import exactly
from seqlab.kernels.on_gpu.states import Operands
from seqlab.kernels.tiles import places, rows_by_rows


class Prepared(NamedTuple):
    """What decays make of tokens: for the scan, and for the delta rule what keys have in common
    (squares, decayed, below the diagonal) and what they read a state with (tokens, for `start`);
    beside it the queries and keys themselves."""

    operands: Operands
    overlaps: Any
    reading: Any
    queries_and_keys: tuple


class Cotangents(NamedTuple):
    """What gradients of queries, keys and decays are made of; the last four of the delta rule."""

    entering: Any  # states
    leaving: Any  # the cotangents of those that leave
    w: Any  # tokens
    dy: Any
    d_norm: Any  # numbers
    d_scores: Any  # squares
    u: Any = None  # tokens
    d_overlaps: Any = None  # squares; the cotangents of what the inverse is of
    beta: Any = None  # numbers


class Gradient(NamedTuple):
    q: Any
    k: Any
    log_decay: Any
    beta: Any


class Solved(NamedTuple):
    """Of the delta rule: T squares, not rounded, the cotangent of w, beta and values."""

    inverse: Any
    dw: Any
    beta: Any
    v: Any


def couplings(sizes: Sizes, x: Cotangents, documents, solved: Solved | None):
    """`x` with what is missing, and the cotangents of v and of beta as far as known (or None)."""
    few, square = x.dy.dtype, (sizes.B, sizes.H, sizes.tokens, sizes.size)
    out: dict[str, Any] = {"d_scores": jax.ShapeDtypeStruct(square, few)}
    if solved is not None:
        like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
        out |= {"u": like(solved.dw), "d_overlaps": out["d_scores"]}
        out |= {"dv": like(solved.v), "d_beta": like(solved.beta)}
    chosen = sizes.blocks(chunk_couplings)
    found = sizes.launch(
        chunk_couplings,
        (1, sizes.chunks, sizes.B * sizes.H),
        {"w": x.w, "dy": x.dy, "d_norm": x.d_norm, "documents": documents, "solved": solved},
        out,
        sizes=sizes,
        width=min(chosen.block[0], sizes.V),
    )
    dv, d_beta = found.pop("dv", None), found.pop("d_beta", None)
    return x._replace(**found, beta=None if solved is None else solved.beta), dv, d_beta


def chunk_couplings(x, out, sizes: Sizes, width: int):
    at, solved = place(sizes), x["solved"]
    i, j = places(sizes.size)
    document = at.numbers(x["documents"])
    same = document[:, None] == document[None, :]
    if solved is not None:
        T, beta = at.square(solved.inverse), at.numbers(solved.beta)[:, None]

    def columns(c, found):
        column = c * width
        dA, dM, d_beta = found
        w, dy = at.tokens(x["w"], column, width), at.tokens(x["dy"], column, width)
        dA += rows_by_rows(dy, w)
        if solved is not None:
            u = exactly(T, at.tokens(solved.dw, column, width), (0, 0))
            at.put_tokens(out["u"], u, column)
            at.put_tokens(out["dv"], beta * u, column)
            dM -= rows_by_rows(u.astype(w.dtype), w)
            d_beta += jnp.sum(u * at.tokens(solved.v, column, width), 1)
        return dA, dM, d_beta

    wide = jnp.promote_types(x["dy"].dtype, jnp.float32)
    nothing = jnp.zeros((sizes.size, sizes.size), wide)
    start = nothing, nothing if solved is not None else None, jnp.zeros(sizes.size, wide)
    dA, dM, d_beta = loop(sizes.V // width, columns, start)
    if x["d_norm"] is not None:
        dA += at.numbers(x["d_norm"])[:, None]
    at.put_square(out["d_scores"], jnp.where(same & (i >= j), dA, 0))
    if solved is not None:
        at.put_square(out["d_overlaps"], jnp.where(same & (i > j), dM, 0))
        at.put_numbers(out["d_beta"], d_beta)


def through_states(at: Place, x: dict, sizes: Sizes, row, rows: int, width: int):
    """For some channels of keys: dy S^T, w D^T, u S^T (None without u), and S D summed over
    values."""
    given = Cotangents(**{name: x[name] for name in Cotangents._fields})
    few, wide = given.w.dtype, jnp.promote_types(given.w.dtype, jnp.float32)

    def columns(c, found):
        column = c * width
        S = at.state(given.entering, row, rows, column, width)
        D = at.state(given.leaving, row, rows, column, width)
        of = lambda ref: at.tokens(ref, column, width)
        terms = [
            rows_by_rows(of(given.dy), S.astype(few)),
            rows_by_rows(of(given.w), D.astype(few)),
            None if given.u is None else rows_by_rows(of(given.u), S.astype(few)),
            jnp.sum(S * D, 1),
        ]
        return jax.tree.map(jnp.add, found, terms)

    tile = jnp.zeros((sizes.size, rows), wide)
    start = [tile, tile, None if given.u is None else tile, jnp.zeros(rows, wide)]
    read, write, known, passes = loop(sizes.V // width, columns, start)
    if given.d_norm is not None:
        n, dn = at.norm(given.entering, row, rows), at.norm(given.leaving, row, rows)
        read += at.numbers(given.d_norm)[:, None] * n
        write += dn.astype(wide)
        passes += n * dn
    return read, write, known, passes
