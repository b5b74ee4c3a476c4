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


def scan_chunks(chunk: Chunk, tokens: tuple, state, size: int, weights: tuple = ()):
    """y [B, T, ...] and the state after the last of T tokens.

    chunk    what one chunk does, forward and backward
    tokens   arrays [B, T, ...]; the last chunk is padded with zeros, which must leave the state be
    weights  arrays that all chunks share
    """
    T = tokens[0].shape[1]
    y, state = _scan(chunk, cut(tokens, size), weights, state)  # pyright: ignore
    whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])[:, :T]
    return jax.tree.map(whole, y), state


def transition(chunk: Chunk, tokens: tuple, size: int, weights: tuple = ()):
    """What all the tokens do to the state that enters them."""
    return compose(jax.vmap(lambda *t: chunk.transition(*t, *weights))(*cut(tokens, size)))


def cut(tokens: tuple, size: int) -> tuple:
    """[B, T, ...] each -> [N, B, C, ...], the last chunk padded with zeros"""

    def one(a):
        a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

    return jax.tree.map(one, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, tokens, weights, state):
    """tokens ([N, B, C, ...], ...) -> y [N, B, C, ...], state"""
    step = lambda S, tokens: chunk.forward(*tokens, *weights, S)[::-1]
    state, y = lax.scan(step, state, tokens)
    return y, state


def _forward(chunk, tokens, weights, state):
    def step(S, tokens):
        y, after = chunk.forward(*tokens, *weights, S)
        return after, (y, S)

    last, (y, entering) = lax.scan(step, state, tokens)
    return (y, last), (tokens, weights, entering)


def _backward(chunk, saved, cotangents):
    tokens, weights, entering = saved
    dy, d_last = cotangents

    def step(carry, xs):
        D, d_weights = carry
        tokens, S, dy = xs
        *d, D = chunk.backward(*tokens, *weights, S, dy, D)
        d_tokens, d_here = d[: len(tokens)], d[len(tokens) :]
        return (D, jax.tree.map(jnp.add, d_weights, tuple(d_here))), tuple(d_tokens)

    none = jax.tree.map(jnp.zeros_like, weights)
    carry = (d_last, none)
    (D, d_weights), d_tokens = lax.scan(step, carry, (tokens, entering, dy), reverse=True)
    like = lambda d, a: None if d is None else d.astype(a.dtype)
    return tuple(like(d, a) for d, a in zip(d_tokens, tokens, strict=True)), d_weights, D


_scan.defvjp(_forward, _backward)
