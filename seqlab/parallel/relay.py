"""Recurrences that no transition describes, while time is split over the mesh axis `seq`.

Their steps wait for each other, so T tokens are T steps whatever the devices; what can be split is
rows: those of the batch, and heads, which do not see each other's state. With P devices of T/P
tokens each, B rows and H heads on each of them:

    way        when            sequential steps     rows x heads a step   sent by a device
    exchange   P divides B H   T                    B H / P               all of its tokens and y
    pipeline   otherwise       (M + P - 1) T / P    B H / M               (M + P - 1) / M states

M, the number of pieces the rows are cut in, is the least divisor of B times a divisor of H that is
not below P, or B H. Either way the whole takes the work of T/P tokens about once for each device,
or (M + P - 1) / M times; one shard after the other would take P times.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.parallel.mesh import SEQ

State = Any


def relay(run: Callable, tokens: tuple, weights: tuple, state: State) -> tuple[Any, State]:
    """Inside a shard: run(*tokens, *weights, state) -> (y, state) of the whole sequence, exactly.

    tokens   arrays [B, T/P, heads, ...], those with one head shared by all, or [B, T/P]
    weights  arrays [heads, ...], or [1, ...] shared
    state    arrays [B, heads, ...] before the whole sequence, the same on every shard
    Returns y [B, T/P, heads, ...] and the state after the whole sequence, the same on every shard.
    """
    P = lax.axis_size(SEQ)
    state = jax.tree.map(lambda a: lax.pcast(a, SEQ, to="varying"), state)
    B, H = _rows(tokens, state)
    if B * H % P == 0:
        heads = math.gcd(H, P)
        return _exchange(run, tokens, weights, state, (P // heads, heads))
    return _pipeline(run, tokens, weights, state, _pieces(B, H, P))


def _exchange(run, tokens, weights, state, parts):
    """Device i has all tokens of piece i of the rows and heads, and then gives y back."""
    P, me = lax.axis_size(SEQ), lax.axis_index(SEQ)

    def gathered(a):  # [parts, B, T/P, ...] -> [B, T, ...], mine
        a = lax.all_to_all(a, SEQ, 0, 0, tiled=True)  # [P, B, T/P, ...] in order of time
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])

    def returned(y):  # [B, T, ...] -> [parts, B, T/P, ...]
        y = jnp.moveaxis(y.reshape(y.shape[0], P, -1, *y.shape[2:]), 1, 0)
        return lax.all_to_all(y, SEQ, 0, 0, tiled=True)

    tokens, weights, state = _cut(parts, tokens, weights, state)
    mine = lambda tree: jax.tree.map(lambda a: a[me], tree)
    y, last = run(*jax.tree.map(gathered, tokens), *mine(weights), mine(state))
    y = jax.tree.map(lambda a: _whole(returned(a), parts, head=2), y)
    return y, _shared(
        jax.tree.map(lambda new, old: jnp.zeros_like(old).at[me].set(new), last, state), parts
    )


def _pipeline(run, tokens, weights, state, parts):
    """At tick t device r runs piece t - r on its tokens, and hands the state on.

    Before its first piece and after its last a device runs one of them again, for nothing.
    """
    P, me, M = lax.axis_size(SEQ), lax.axis_index(SEQ), math.prod(parts)
    tokens, weights, state = _cut(parts, tokens, weights, state)
    at = lambda tree, n: jax.tree.map(lambda a: a[n], tree)
    onward = [(i, i + 1) for i in range(P - 1)]

    def tick(arrived, t):
        piece = jnp.clip(t - me, 0, M - 1)
        entering = jax.tree.map(lambda a, b: jnp.where(me == 0, a, b), at(state, piece), arrived)
        y, leaving = run(*at(tokens, piece), *at(weights, piece), entering)
        sent = jax.tree.map(lambda a: lax.ppermute(a, SEQ, onward), leaving)
        return sent, (y, leaving)

    _, ticks = lax.scan(tick, at(state, 0), jnp.arange(M + P - 1))
    y, leaving = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, me, M), ticks)
    last = jax.tree.map(lambda a: jnp.where(me == P - 1, a, 0), leaving)
    return jax.tree.map(lambda a: _whole(a, parts, head=2), y), _shared(last, parts)


def _rows(tokens, state) -> tuple[int, int]:
    """How many rows and heads there are."""
    heads = [a.shape[2] for a in jax.tree.leaves(tokens) if a.ndim > 2]
    heads += [a.shape[1] for a in jax.tree.leaves(state) if a.ndim > 1]
    return jax.tree.leaves(tokens)[0].shape[0], max(heads)


def _pieces(B: int, H: int, P: int) -> tuple[int, int]:
    """Into how many pieces to cut rows and heads for a pipeline over P devices."""
    divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
    cuts = [(b, h) for b in divisors(B) for h in divisors(H)]
    return min(cuts, key=lambda cut: (max(P - math.prod(cut), 0), math.prod(cut), cut[1]))


def _cut(parts, tokens, weights, state):
    """Pieces in front: [B, T, H, ...] -> [rows * heads, B / rows, T, H / heads, ...]"""
    cut = functools.partial(_apart, parts)
    return (
        jax.tree.map(lambda a: cut(a, 0, 2), tokens),
        jax.tree.map(lambda a: cut(a, None, 0), weights),
        jax.tree.map(lambda a: cut(a, 0, 1), state),
    )


def _apart(parts, a, row: int | None, head: int):
    rows, heads = parts
    if a.ndim <= head or a.shape[head] == 1:  # the same for all heads
        a = jnp.broadcast_to(a, (heads, *a.shape))
    else:
        a = _split(a, heads, head)
    a = jnp.broadcast_to(a, (rows, *a.shape)) if row is None else _split(a, rows, row + 1)
    return a.reshape(rows * heads, *a.shape[2:])


def _split(a, parts: int, axis: int):
    a = a.reshape(*a.shape[:axis], parts, -1, *a.shape[axis + 1 :])
    return jnp.moveaxis(a, axis, 0)


def _whole(a, parts, head: int):
    """The inverse of `_apart`, for what is not the same for all heads."""
    rows, heads = parts
    a = a.reshape(rows, heads, *a.shape[1:])
    a = jnp.moveaxis(a, 1, head + 1)  # [rows, B, ..., heads, H, ...]
    a = a.reshape(*a.shape[: head + 1], -1, *a.shape[head + 3 :])
    return a.reshape(-1, *a.shape[2:])


def _shared(pieces, parts):
    """The state of which every device has some pieces and zeros, now whole on all of them."""
    total = lambda a: lax.psum(a, SEQ)
    return jax.tree.map(lambda a: _whole(total(a), parts, head=1), pieces)
