"""A state carried from chunk to chunk, with gradients that keep nothing but the states between.

Every chunked form in XLA is the same loop: tokens are cut in chunks, a chunk turns the state that
enters it into outputs and the state that leaves it, and the backward pass walks the chunks in
reverse, recomputing each from the state that entered. What a chunk does is its family's own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.kept import kept
from seqlab.parallel.transitions import compose

#: Hops of a state beside one chunk: more would not be hidden.
MOST_HOPS = 4


class Chunk(Protocol):
    """What a family defines (a module or a namespace of functions), for one chunk [B, C, ...]."""

    #: *tokens, *weights, the state that enters -> y, the state that leaves
    forward: Callable[..., tuple[Any, Any]]
    #: *tokens, *weights, the state that enters, the cotangents of y and of the state that leaves ->
    #: the cotangents of every token array (None for bool), every weight and the state
    backward: Callable[..., tuple[Any, ...]]
    #: *tokens, *weights -> what the chunk does to the state that enters it
    transition: Callable[..., Any]
    # optional: keep(*tokens, *weights, the state that enters) -> the part of it that `backward`
    # takes in its place


def scan_chunks(
    chunk: Chunk, tokens: tuple, state, size: int, weights: tuple = (), skipped: int = 0
):
    """y [B, T, ...] and the state after the last of T tokens.

    chunk    what one chunk does, forward and backward
    tokens   arrays [B, T, ...]; the last chunk is padded with zeros, which must leave the state be
    weights  arrays that all chunks share
    skipped  chunks at the beginning that y leaves out; the state enters after them
    """
    padded = _padded(tokens, size)
    part = Part(chunk, size, skipped, padded[0].shape[1] // size)
    y, state = _scan(part, padded, weights, state)  # pyright: ignore
    return jax.tree.map(lambda a: a[:, : tokens[0].shape[1] - skipped * size], y), state


class InXLA(NamedTuple):
    """`scan_chunks` as a form of `platforms.scan`, of tokens and y as a family's callers see them.

    prepared  *tokens -> those that the chunks take: each what is given, or more columns of it
    finished  y, *tokens -> the results
    turned    the results' cotangents -> that of y
    weights   how many of the tokens, the last of them, are weights
    """

    chunk: Any
    size: int
    prepared: Callable[..., tuple]
    finished: Callable[..., Any]
    turned: Callable[[Any], Any]
    weights: int = 0

    def run(self, tokens, state):
        prepared, weights = self._apart(tokens)
        y, state = scan_chunks(self.chunk, prepared, state, self.size, weights)
        return self.finished(y, *tokens), state

    def keeping(self, tokens, state):
        part, padded, weights = self._part(tokens)
        (y, state), (_, _, entering) = _forward(part, padded, weights, state)
        entering = _regrouped(entering, (-1, len(tokens[0])))
        return (self.finished(y[:, : tokens[0].shape[1]], *tokens), state), entering

    def backward(self, tokens, entering, d_y, d_state):
        part, padded, weights = self._part(tokens)
        dy = _padded(self.turned(d_y), self.size)
        saved = padded, weights, _regrouped(entering, (part.stop, -1))
        d_tokens, d_weights, d_state = _backward(part, saved, (dy, d_state))
        given = lambda d, a: None if d is None else d[tuple(map(slice, a.shape))].astype(a.dtype)
        return tuple(map(given, (*d_tokens, *d_weights), tokens)), d_state

    def _apart(self, tokens):
        prepared = self.prepared(*tokens)
        cut = len(prepared) - self.weights
        return prepared[:cut], prepared[cut:]

    def _part(self, tokens):
        prepared, weights = self._apart(tokens)
        padded = _padded(prepared, self.size)
        return Part(self.chunk, self.size, 0, padded[0].shape[1] // self.size), padded, weights


class Part(NamedTuple):
    """Chunks number `start` to `stop` of tokens: y of these, and the state after them, of tokens
    [B, N * size, ...], weights and the state before them. Work to do while states travel, in the
    sense of `sequence.Work`."""

    chunk: Any
    size: int
    start: int
    stop: int

    def forward(self, scan, tokens, weights, state):
        """(y, state), and what the backward pass needs."""
        return _forward(self, tokens, weights, state, scan=scan)

    def backward(self, scan, saved, cotangents):
        """Cotangents of tokens, weights and state."""
        return _backward(self, saved, cotangents, scan=scan)


class Apart(NamedTuple):
    """Tokens in two: work on the first of them while states travel, and the rest.

    work, operands  of `sequence.enter_beside`
    finish          its results, the state that enters -> y of all tokens
    """

    work: Part
    operands: tuple
    finish: Callable[[Any, Any], Any]


def apart(
    chunk: Chunk,
    tokens: tuple,
    nothing,
    size: int,
    hops: int,
    remembered: Callable[..., tuple],
    weights: tuple = (),
) -> Apart | None:
    """The first chunks, one a hop, from a state of zeros (`nothing`), and what follows when the
    state that enters is known. Where there are not as many chunks, each takes several hops; None
    where that would be more than MOST_HOPS.

    remembered  *tokens, *weights, state -> what tokens read of it, and what they leave of it, if
                they write nothing
    """
    T = tokens[0].shape[1]
    if hops > MOST_HOPS * (T // size):
        return None
    chunks = hops // -(-hops // (T // size))
    end = chunks * size

    def finish(results, entering):
        y, state = results
        more, left = remembered(*(a[:, :end] for a in tokens), *weights, entering)
        if end == T:
            return y + more
        rest, _ = scan_chunks(chunk, tokens, state + left, size, weights, skipped=chunks)
        return jnp.concatenate([y + more, rest], 1)

    operands = _padded(tokens, size), weights, nothing
    return Apart(Part(chunk, size, 0, chunks), operands, finish)


def transition(chunk: Chunk, tokens: tuple, size: int, weights: tuple = ()):
    """What all the tokens do to the state that enters them."""
    return compose(jax.vmap(lambda *t: chunk.transition(*t, *weights))(*cut(tokens, size)))


def cut(tokens: tuple, size: int) -> tuple:
    """[B, T, ...] each -> [N, B, C, ...], the last chunk padded with zeros"""
    apart = lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
    return jax.tree.map(apart, _padded(tokens, size))


def _padded(tokens, size: int):
    pad = lambda a: jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
    return jax.tree.map(pad, tokens)


def _chunk_at(n, tokens, size: int):
    """Chunk n of tokens [B, T, ...]: reading it where it lies spares a copy of all of them."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, n * size, size, 1), tokens)


def _joined(chunks):
    """[N, B, C, ...] -> [B, N * C, ...]"""
    whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])
    return jax.tree.map(whole, chunks)


def _regrouped(entering, shape: tuple[int, int]):
    """States by steps and rows, a step of chunks that run together having rows for each of them."""
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[2:]), entering)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(part: Part, tokens, weights, state):
    """tokens ([B, N * C, ...], ...) -> y [B, (stop - start) * C, ...], state"""
    return _run(part, tokens, weights, state, keep=lambda *args: None)[0]


def _forward(part, tokens, weights, state, scan=lax.scan):
    keep = getattr(part.chunk, "keep", lambda *args: args[-1])
    return _run(part, tokens, weights, state, keep, scan)


def _run(part, tokens, weights, state, keep, scan=lax.scan):
    def step(S, n):
        here = (*_chunk_at(n, tokens, part.size), *weights, S)
        y, after = part.chunk.forward(*here)
        return after, (y, keep(*here))

    last, (y, entering) = kept(scan(step, state, jnp.arange(part.start, part.stop)))
    return (_joined(y), last), (tokens, weights, entering)


def _backward(part, saved, cotangents, scan=lax.scan):
    tokens, weights, entering = saved
    dy, d_last = cotangents

    def step(carry, xs):
        D, d_weights = carry
        n, S = xs
        here = _chunk_at(n, tokens, part.size)
        dy_here = _chunk_at(n - part.start, dy, part.size)
        *d, D = part.chunk.backward(*here, *weights, S, dy_here, D)
        d_tokens, d_here = d[: len(tokens)], d[len(tokens) :]
        return (D, jax.tree.map(jnp.add, d_weights, tuple(d_here))), tuple(d_tokens)

    none = jax.tree.map(jnp.zeros_like, weights)
    xs = jnp.arange(part.start, part.stop), entering
    (D, d_weights), d_tokens = scan(step, (d_last, none), xs, reverse=True)
    like = lambda d, a: None if d is None else _within(part, _joined(d).astype(a.dtype), a)
    return tuple(like(d, a) for d, a in zip(d_tokens, tokens, strict=True)), d_weights, D


def _within(part: Part, d, whole):
    """Cotangents of a part's tokens as those of all tokens."""
    before = part.start * part.size
    after = whole.shape[1] - before - d.shape[1]
    return jnp.pad(d, [(0, 0), (before, after)] + [(0, 0)] * (d.ndim - 2))


_scan.defvjp(_forward, _backward)
