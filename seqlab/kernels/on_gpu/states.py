"""The states of a scan over chunks, what queries read of them, and both backwards, on a GPU.

For a chunk of one head, with S the state that enters it, start and end the decays of tokens from
and to the ends of the chunk, A the decayed scores, and W what the delta rule erases by (else none):

    w  = U - W S              S' = whole S + (end k)^T w              y = (start q) S + A w

and with D the cotangent of S':

    dw = A^T dy + (end k) D   D_prev = whole D + (start q)^T dy - W^T dw

Columns of values are independent: a program walks over the chunks with some columns of the state in
its registers, and writes what enters each chunk; then the outputs of all chunks are read at once. A
normaliser is one column more, of values 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqlab.kernels.on_gpu.chunks import Sizes, loop, place
from seqlab.kernels.tiles import columns_by_columns, product

#: Numbers of a state that a program holds: 64 registers of each of its 128 threads.
HELD = 8192


class Operands(NamedTuple):
    """Of all chunks. If decays are one a channel, queries and keys have them in, and `start` and
    `end` are 1."""

    q: Any  # tokens
    k: Any
    start: Any  # numbers
    end: Any
    whole: Any  # [B, H, N, K]
    scores: Any  # squares


def walk(sizes: Sizes, x: Operands, v, erase, state, keep: bool):
    """The states that enter the chunks [N, B, H, K, V], not rounded if to `keep`; the one that
    leaves the last; and the values that are written: v, or with `erase` (W; v is U) what that
    leaves of it."""
    entering = (sizes.chunks, *state.shape)
    found = _launch(
        chunk_states,
        sizes,
        1,
        {"k": x.k, "end": x.end, "whole": x.whole, "v": v, "W": erase, "state": state[None]},
        {
            "entering": jax.ShapeDtypeStruct(entering, state.dtype if keep else v.dtype),
            "last": jax.ShapeDtypeStruct((1, *state.shape), state.dtype),
            "w": None if erase is None else jax.ShapeDtypeStruct(v.shape, v.dtype),
        },
    )
    return found["entering"], found["last"][0], v if erase is None else found["w"]


def chunk_states(x, out, sizes: Sizes, width: int):
    first, column = place(sizes), pl.program_id(0) * width
    normalised = out["last"].shape[4] > sizes.V

    def chunk(n, carry):
        S, norm = carry
        at = first._replace(n=n)
        at.put_state(out["entering"], S, column)
        k, end, whole = at.tokens(x["k"]), at.numbers(x["end"])[:, None], at.whole(x["whole"])
        w = at.tokens(x["v"], column, width)
        if x["W"] is not None:
            w = w - product(at.tokens(x["W"]), S.astype(k.dtype))
            at.put_tokens(out["w"], w, column)
        S = whole[:, None] * S + columns_by_columns(k, (end * w).astype(k.dtype))
        if norm is not None:  # every program's is the same
            at.put_norm(out["entering"], norm)
            norm = whole * norm + jnp.sum(end * k, 0)
        return S, norm

    S = first.state(x["state"], 0, sizes.K, column, width)
    norm = first.norm(x["state"]) if normalised else None
    S, norm = loop(sizes.chunks, chunk, (S, norm))
    first.put_state(out["last"], S, column)
    if norm is not None:
        first.put_norm(out["last"], norm)


def read(sizes: Sizes, x: Operands, w, entering, like):
    """y like `like`, and what queries read of the normaliser as numbers, None if there is none."""
    normalised = entering.shape[4] > sizes.V
    numbers = jax.ShapeDtypeStruct(x.start.shape, x.start.dtype)
    out = {"y": like, "norm": numbers if normalised else None}
    given = {**x._replace(k=None, end=None, whole=None)._asdict(), "w": w, "entering": entering}
    found = _launch(chunk_outputs, sizes, sizes.chunks, given, out)
    return found["y"], found["norm"]


def chunk_outputs(x, out, sizes: Sizes, width: int):
    at, column = place(sizes), pl.program_id(0) * width
    q, w, A = at.tokens(x["q"]), at.tokens(x["w"], column, width), at.square(x["scores"])
    start = at.numbers(x["start"])
    S = at.state(x["entering"], 0, sizes.K, column, width).astype(q.dtype)
    y = start[:, None] * product(q, S) + product(A, w)
    at.put_tokens(out["y"], y, column)
    if out["norm"] is not None:
        n = at.norm(x["entering"])
        at.put_numbers(out["norm"], start * jnp.sum(q * n, 1) + jnp.sum(A.astype(n.dtype), 1))


def walk_back(sizes: Sizes, x: Operands, erase, dy, d_norm, d_state, like):
    """The cotangents of the states that leave the chunks, rounded as operands; of what is written,
    shaped like `like`; and of the state that enters the first."""
    given = {**x._asdict(), "W": erase, "dy": dy, "d_norm": d_norm, "d_last": d_state[None]}
    leaving = (sizes.chunks, *d_state.shape)
    out = {
        "leaving": jax.ShapeDtypeStruct(leaving, dy.dtype),
        "dw": like,
        "d_state": jax.ShapeDtypeStruct((1, *d_state.shape), d_state.dtype),
    }
    found = _launch(chunk_states_backward, sizes, 1, given, out)
    return found["leaving"], found["dw"], found["d_state"][0]


def chunk_states_backward(x, out, sizes: Sizes, width: int):
    first, column = place(sizes), pl.program_id(0) * width

    def chunk(i, carry):
        D, norm = carry
        at = first._replace(n=sizes.chunks - 1 - i)
        at.put_state(out["leaving"], D, column)
        dy, q, k = at.tokens(x["dy"], column, width), at.tokens(x["q"]), at.tokens(x["k"])
        start, end = at.numbers(x["start"])[:, None], at.numbers(x["end"])[:, None]
        dw = columns_by_columns(at.square(x["scores"]), dy)
        dw += end * product(k, D.astype(k.dtype))
        at.put_tokens(out["dw"], dw, column)
        whole = at.whole(x["whole"])
        D = whole[:, None] * D + columns_by_columns(q, (start * dy).astype(q.dtype))
        if x["W"] is not None:
            D -= columns_by_columns(at.tokens(x["W"]), dw.astype(k.dtype))
        if norm is not None:  # every program's is the same
            at.put_norm(out["leaving"], norm)
            norm = whole * norm + jnp.sum(start * at.numbers(x["d_norm"])[:, None] * q, 0)
        return D, norm

    D = first.state(x["d_last"], 0, sizes.K, column, width)
    norm = None if x["d_norm"] is None else first.norm(x["d_last"])
    D, norm = loop(sizes.chunks, chunk, (D, norm))
    first.put_state(out["d_state"], D, column)
    if norm is not None:
        first.put_norm(out["d_state"], norm)


def _launch(kernel, sizes: Sizes, chunks: int, inputs, outputs):
    """On some columns of values of some chunks of every head."""
    chosen = sizes.blocks(kernel)
    width = min(chosen.block[0], sizes.V, HELD // sizes.K)
    grid = (sizes.V // width, chunks, sizes.B * sizes.H)
    return sizes.launch(kernel, grid, inputs, outputs, sizes=sizes, width=width)
