"""The network that serves as a memory: a perceptron of any depth; and what a state keeps of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

EPS = 1e-6  # of the norm

ACTIVATIONS: dict[str, Callable] = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}


class Weights(NamedTuple):
    """What a document starts with. Without `norm`, f(x) = MLP(x); with it, x + norm(MLP(x)).

    A layer with one row more than its input has channels takes the last row as its bias.
    """

    layers: tuple[jax.Array, ...]  # [H, d_in, d_out] or [H, d_in + 1, d_out], from K to V
    norm: tuple[jax.Array, ...] = ()  # gain and bias [H, V] of a layer norm, which stay as they are


class State(NamedTuple):
    """Of the current document; each of the first three is one array [B, H, d_in, d_out] a layer."""

    weights: tuple  # W - W_0; in `test_time_training`, at the start of the chunk
    momentum: tuple  # in `test_time_training`, the sum of the chunk's gradients
    start: tuple  # W - W_0 at the start of the chunk; empty in `test_time_training`
    phase: jax.Array  # [B, H] int32, which token of its chunk comes next


def empty(batch: int, layers: tuple, *, start: bool = True) -> State:
    """The state before a document, for layers of these shapes; `start` for `test_time_memory`."""
    zeros = lambda: tuple(jnp.zeros((batch, *W.shape), jnp.float32) for W in layers)
    phase = jnp.zeros((batch, layers[0].shape[0]), jnp.int32)
    return State(zeros(), zeros(), zeros() if start else (), phase)


def network(x: jax.Array, product: Callable, weights: Weights, activation: str) -> jax.Array:
    """f(x) [B, H, C, V] of x [B, H, C, K], where product(n, h) is h times the matrix of layer n."""
    h = x
    for layer, matrix in enumerate(weights.layers):
        h = ACTIVATIONS[activation](h) if layer else h
        h = product(layer, _with_one(h) if matrix.shape[-2] > h.shape[-1] else h)
    return x + _norm(h, *weights.norm) if weights.norm else h


def _with_one(h):
    return jnp.concatenate([h, jnp.ones_like(h[..., :1])], -1)


def _norm(h, gain, bias):
    h = h - jnp.mean(h, -1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + EPS)
    return h * gain[:, None] + bias[:, None]
