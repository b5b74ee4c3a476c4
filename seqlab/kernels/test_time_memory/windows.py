"""Chunks that start where documents start, in shapes that know nothing of where that is.

The chunks of a document are counted from its first token, so in packed rows their borders lie
anywhere. A scan therefore goes over groups of consecutive tokens, and in each over windows, cut row
by row: a window ends where a chunk of the document that entered it ends, or else after as many
tokens as a chunk has. Documents that begin inside a window cannot reach the end of their first
chunk there, so a window knows two kinds of tokens, those of the document that enters and those of
documents that begin. A window is shorter than a chunk only at the start of a group, or behind one
in which a document began, so that 2 windows a chunk are always enough; those that are not needed
are skipped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.chunk_scan import scan_chunks
from seqlab.kernels.precision import widen

GROUP = 8  # chunks between two states that are kept for the backward pass


def places(reset: jax.Array, phase: jax.Array, chunk_size: int) -> jax.Array:
    """Which token of its chunk each token is, [B, T] int32, from 0.

    reset [B, T] bool; phase [B] int32, the place of the first token if no document starts there.
    """
    t = jnp.arange(reset.shape[1], dtype=jnp.int32)
    began = lax.cummax(jnp.where(reset, t, -phase[:, None]), axis=1)
    return (t - began) % chunk_size


def scan_windows(
    run: Callable, options, tokens: tuple, reset, place, weights, state, *, chunk_size: int
):
    """y [B, T, ...] and the state after all tokens, keeping a state every `GROUP` chunks.

    run       run(options, tokens, reset, place, valid, weights, state) -> y, state, for one window:
              tokens [B, C, ...], of which `valid` [B, C] says which there are; y is float32 or
              wider; a state is returned as it came for a row in which there are none
    options   hashable
    tokens    arrays [B, T, ...] of numbers, the first of them as y is
    weights   a tree of arrays of numbers, the same for all tokens
    state     a tree of arrays [B, ...] of numbers
    """
    T, real = reset.shape[1], jnp.ones_like(reset)
    # windows multiply what is forgotten by 0, which numbers that are none would survive
    over = lambda a: reset[:, 0].reshape(-1, *(1,) * (a.ndim - 1))
    state = jax.tree.map(lambda a: jnp.where(over(a), 0, a), state)
    if T == 1:
        return run(options, tokens, reset, place, real, weights, state)
    size = min(chunk_size, T)
    group: Any = _Group(run, options, size)  # a chunk without a transition
    count = min(GROUP, -(-T // size)) if size == chunk_size else 1
    return scan_chunks(group, (*tokens, reset, place, real), state, size * count, (weights,))


class _Group(NamedTuple):
    """One chunk of `chunk_scan`: several windows, all of whose states but the first are dropped and
    computed again on the way back."""

    run: Callable
    options: tuple
    size: int

    def forward(self, *args):
        *tokens, reset, place, real, weights, state = args
        cut = _cut(reset, place, real, self.size)
        row = jnp.arange(len(reset))[:, None]
        *tokens, reset, place = (a[row, cut.index] for a in (*tokens, reset, place))

        def window(state, piece):
            *tokens, reset, place, valid = piece
            work = lambda state: self.run(self.options, tokens, reset, place, valid, weights, state)
            nothing = lambda state: (0 * widen(tokens[0]), state)
            y, state = lax.cond(jnp.any(valid), work, nothing, state)
            return state, y

        pieces = (*tokens, reset, place, cut.valid)
        state, y = lax.scan(jax.checkpoint(window, prevent_cse=False), state, pieces)
        return y[cut.window, row, cut.slot], state

    def backward(self, *args):
        *tokens, reset, place, real, weights, state, dy, d_state = args
        run = lambda tokens, weights, state: self.forward(
            *tokens, reset, place, real, weights, state
        )
        _, pull = jax.vjp(run, tuple(tokens), weights, state)
        d_tokens, d_weights, d_state = pull((dy, d_state))
        return *d_tokens, None, None, None, d_weights, d_state


class _Cut(NamedTuple):
    index: jax.Array  # [N, B, C] the token in each slot of each window
    valid: jax.Array  # [N, B, C] whether there is one
    window: jax.Array  # [B, T] the window of each token, and
    slot: jax.Array  # [B, T] its slot there


def _cut(reset, place, real, size: int) -> _Cut:
    """Windows of at most `size` tokens over all real tokens of a group, which come first."""
    T = reset.shape[1]
    t, total = jnp.arange(T), jnp.sum(real, 1, dtype=jnp.int32)
    border = jnp.where((place == 0) & ~reset, t, T).astype(jnp.int32)
    following = lax.cummin(border, axis=1, reverse=True)  # the first border from t on
    following = jnp.pad(following, [(0, 0), (0, 2)], constant_values=T)

    def step(start, _):
        border = jnp.take_along_axis(following, start[:, None] + 1, 1)[:, 0]
        end = jnp.minimum(jnp.minimum(start + size, border), total)
        return end, (start, end)

    _, (start, end) = lax.scan(step, total * 0, length=2 * (-(-T // size)))
    index = start[..., None] + jnp.arange(size, dtype=jnp.int32)
    window = jnp.sum(start[..., None] <= t, 0) - 1
    slot = t - jnp.take_along_axis(start.T, window, 1)
    return _Cut(jnp.minimum(index, T - 1), index < end[..., None], window, slot)
