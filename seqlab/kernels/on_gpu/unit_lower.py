"""(I + M)^-1 of all chunks of a delta rule, and what it makes of keys and values, on a GPU.

Blocks of 16 are inverted as on a TPU; those between them follow by substitution, block by block, in
float32: sixteen rows are the smallest product a GPU has, and in larger squares most of it would be
zeros. Products with the inverse do not round it (see `products`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqlab.kernels.on_gpu.chunks import Sizes, loop, place
from seqlab.kernels.on_gpu.products import exactly
from seqlab.kernels.tile_inverse import inverse as inverse_on_tile
from seqlab.kernels.tiles import product

BLOCK = 16


def inverse(sizes: Sizes, overlaps, beta):
    """Squares, for M = beta (numbers) times overlaps (squares), 0 but below the diagonal."""
    found = sizes.launch(
        chunk_inverse,
        (1, sizes.chunks, sizes.B * sizes.H),
        {"overlaps": overlaps, "beta": beta},
        {"inverse": jax.ShapeDtypeStruct(overlaps.shape, overlaps.dtype)},
        sizes=sizes,
    )
    return found["inverse"]


def chunk_inverse(x, out, sizes: Sizes):
    first, last = place(sizes, size=BLOCK), sizes.size // BLOCK
    nothing = jnp.zeros((BLOCK, BLOCK), out["inverse"].dtype)
    X: dict[tuple[int, int], Any] = {}
    for a in range(last):
        at = first._replace(n=first.n * last + a)
        beta = at.numbers(x["beta"])[:, None]
        M = [beta * at.block(x["overlaps"], c) for c in range(a + 1)]
        X[a, a] = inverse_on_tile(M[a])
        for c in range(a):
            known = sum((product(M[b], X[b, c]) for b in range(c + 1, a)), product(M[c], X[c, c]))
            X[a, c] = -product(X[a, a], known)
        for c in range(last):
            at.put_block(out["inverse"], X.get((a, c), nothing), c)


def corrections(sizes: Sizes, T, beta, start, v, reading, entering):
    """U = T beta v and W = T beta start k, tokens of whole chunks, of keys `reading`. Of the states
    that enter, w = U - W S is returned in place of U."""
    tokens = lambda X, dtype: jax.ShapeDtypeStruct((sizes.B, sizes.tokens, sizes.H, X), dtype)
    chosen = sizes.blocks(chunk_corrections)
    found = sizes.launch(
        chunk_corrections,
        (1, sizes.chunks, sizes.B * sizes.H),
        {"T": T, "beta": beta, "start": start, "v": v, "k": reading, "entering": entering},
        {"w": tokens(sizes.V, v.dtype), "W": tokens(sizes.K, v.dtype)},
        sizes=sizes,
        rows=min(chosen.block[0], sizes.K),
        width=min(chosen.block[1], sizes.V),
    )
    return found["w"], found["W"]


def chunk_corrections(x, out, sizes: Sizes, rows: int, width: int):
    at = place(sizes)
    T, beta = at.square(x["T"]), at.numbers(x["beta"])[:, None]
    start = at.numbers(x["start"])[:, None]
    W = {}
    for row in range(0, sizes.K, rows):
        k = at.tokens(x["k"], row, rows)
        W[row] = exactly(T, (beta * start * k).astype(k.dtype)).astype(k.dtype)
        at.put_tokens(out["W"], W[row], row)

    def columns(c, nothing):
        v = at.tokens(x["v"], c * width, width)
        w = exactly(T, (beta * v).astype(v.dtype))
        if x["entering"] is not None:
            for row, of_keys in W.items():
                S = at.state(x["entering"], row, rows, c * width, width)
                w -= product(of_keys, S.astype(v.dtype))
        at.put_tokens(out["w"], w, c * width)
        return nothing

    loop(sizes.V // width, columns, jnp.int32(0))
