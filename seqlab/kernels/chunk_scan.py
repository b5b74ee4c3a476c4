"""A state carried from chunk to chunk, with gradients that keep nothing but the states between.

Every chunked form in XLA is the same loop: tokens are cut in chunks, a chunk turns the state that
enters it into outputs and the state that leaves it, and the backward pass walks the chunks in
reverse, recomputing each from the state that entered. What a chunk does is its family's own.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.kept import kept
from seqlab.parallel.transitions import compose


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


def scan_chunks(chunk: Chunk, tokens: tuple, state, size: int, weights: tuple = ()):
    """y [B, T, ...] and the state after the last of T tokens.

    chunk    what one chunk does, forward and backward
    tokens   arrays [B, T, ...]; the last chunk is padded with zeros, which must leave the state be
    weights  arrays that all chunks share
    """
    T = tokens[0].shape[1]
    y, state = _scan(chunk, size, _padded(tokens, size), weights, state)  # pyright: ignore
    return jax.tree.map(lambda a: a[:, :T], y), state


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


def _numbers(tokens, size: int) -> jax.Array:
    return jnp.arange(tokens[0].shape[1] // size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(chunk, size, tokens, weights, state):
    """tokens ([B, N * C, ...], ...) -> y [B, N * C, ...], state"""
    return _run(chunk, size, tokens, weights, state, keep=lambda *args: None)[0]


def _forward(chunk, size, tokens, weights, state):
    keep = getattr(chunk, "keep", lambda *args: args[-1])
    return _run(chunk, size, tokens, weights, state, keep)


def _run(chunk, size, tokens, weights, state, keep):
    def step(S, n):
        here = (*_chunk_at(n, tokens, size), *weights, S)
        y, after = chunk.forward(*here)
        return after, (y, keep(*here))

    last, (y, entering) = kept(lax.scan(step, state, _numbers(tokens, size)))
    return (_joined(y), last), (tokens, weights, entering)


def _backward(chunk, size, saved, cotangents):
    tokens, weights, entering = saved
    dy, d_last = cotangents

    def step(carry, xs):
        D, d_weights = carry
        n, S = xs
        here, dy_here = _chunk_at(n, (tokens, dy), size)
        *d, D = chunk.backward(*here, *weights, S, dy_here, D)
        d_tokens, d_here = d[: len(tokens)], d[len(tokens) :]
        return (D, jax.tree.map(jnp.add, d_weights, tuple(d_here))), tuple(d_tokens)

    none = jax.tree.map(jnp.zeros_like, weights)
    xs = _numbers(tokens, size), entering
    (D, d_weights), d_tokens = lax.scan(step, (d_last, none), xs, reverse=True)
    like = lambda d, a: None if d is None else _joined(d).astype(a.dtype)
    return tuple(like(d, a) for d, a in zip(d_tokens, tokens, strict=True)), d_weights, D


_scan.defvjp(_forward, _backward)
