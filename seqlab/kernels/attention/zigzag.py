"""Ring attention in which every device has the same to do at every step, though it is causal.

With time cut in 2 P pieces, device r takes pieces r and 2 P - 1 - r for the time of the layer
(Zhu, 2024: ring-flash-attention): the last of the early ones goes with the first of the late ones.
Masks come from positions and documents, so it is the ring on tokens in another order.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.attention.meetings import RING
from seqlab.kernels.attention.xla import (
    InXLA,
    Keys,
    Options,
    Queries,
    attend,
    block_for,
    in_columns,
    in_order,
    in_rows,
)
from seqlab.kernels.platforms import Forms
from seqlab.parallel.mesh import SEQ


def balanced(options: Options, queries: tuple, keys: tuple, past: tuple | None):
    """As the ring does, on this shard's tokens; half of them travel once more each way."""
    rows, columns = block_for(options.window)
    (B, T, H), G = queries[0].shape[:3], keys[0].shape[2]
    early, late = (in_rows(half, G, rows) for half in deal(_even(queries)))
    both = Queries(*map(jnp.concatenate, zip(early, late, strict=True), (0, 1)))
    early, late = (in_columns(half, columns) for half in deal(_even(keys)))
    all_keys = Keys(*map(jnp.concatenate, zip(early, late, strict=True), (0, 0, 1)))
    ring = Forms(InXLA(options, RING))
    outputs = attend(ring, both, all_keys, past and in_columns(past, columns))
    halves = zip(*(jnp.split(a, 2) for a in outputs), strict=True)
    y, lse = collect(*(in_order(half, (B, -(-T // 2), H)) for half in halves))
    return y[:, :T], lse[:, :T]


def deal(tree) -> tuple:
    """Of arrays [B, 2 C, ...] in order of time: those of the early and of the late piece here."""
    even, (first, second), _ = _routes()
    half = lambda a: a.shape[1] // 2
    a = jax.tree.map(lambda a: lax.ppermute(a[:, : half(a)], SEQ, first), tree)
    b = jax.tree.map(lambda a: lax.ppermute(a[:, half(a) :], SEQ, second), tree)
    return _either(even, a, b), _either(even, b, a)


def collect(early, late):
    """The inverse of `deal`."""
    even, _, (first, second) = _routes()
    a, b = _either(even, early, late), _either(even, late, early)
    home = lambda a, b: [lax.ppermute(a, SEQ, first), lax.ppermute(b, SEQ, second)]
    return jax.tree.map(lambda a, b: jnp.concatenate(home(a, b), 1), a, b)


def _routes():
    """Whether this device's early piece is the first of a pair; the routes of the first and the
    second pieces of all pairs, there and back."""
    size = lax.axis_size(SEQ)
    home = lambda piece: min(piece, 2 * size - 1 - piece)
    there = [[(i, home(2 * i + second)) for i in range(size)] for second in (0, 1)]
    back = [[(to, origin) for origin, to in route] for route in there]
    return lax.axis_index(SEQ) % 2 == 0, there, back


def _either(which, a, b):
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), a, b)


def _even(tokens: tuple) -> tuple:
    """With one token more, of no document, if their number is odd."""
    *rest, document = tokens
    odd = lambda a: [(0, 0), (0, a.shape[1] % 2)] + [(0, 0)] * (a.ndim - 2)
    rest = (jnp.pad(a, odd(a)) for a in rest)
    return *rest, jnp.pad(document, odd(document), constant_values=-1)
