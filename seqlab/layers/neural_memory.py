"""The long-term memory of Titans (Behrouz, Zhong & Mirrokni, 2024, section 3), as a part of mixers:
what goes into a network that is trained while it is read, and what it answers."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels import test_time_memory as kernel
from seqlab.kernels.precision import widen
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.norm import unit_length
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """Each head has a perceptron of `depth` layers of its own, `expand` times as wide inside as the
    head. Gradients are taken at the weights with which a chunk of `chunk_size` tokens began, and
    their rate is at most `max_inner_lr`: with rates of 0.4 and more, training was seen to end in
    NaN.

    Not in the paper, for the sake of stability: weights decay to those they start with, unless
    `decay_to` is "zero", and values are made of length 1 too, unless `unit_values` is false.
    `read` is "token", or "chunk": queries read the weights with which their chunk began.
    """

    heads: PositiveInt = 4
    depth: PositiveInt = 2
    expand: PositiveFinite = 2.0
    conv_width: NonNegativeInt = 4  # of the short convolution over q, k and v; 0 for none
    max_inner_lr: PositiveFinite = 0.1
    unit_values: bool = True
    decay_to: Literal["init", "zero"] = "init"
    read: Literal["token", "chunk"] = "token"
    activation: Literal["gelu", "silu"] = "gelu"
    chunk_size: PositiveInt = 16
    implementation: str | None = None


class State(NamedTuple):
    conv: tuple  # the state of the short convolution, empty without one
    memory: kernel.State


class NeuralMemory(nnx.Module):
    """x, y [B, T, D]; y_t are the heads' answers f_{W_t}(q_t), side by side.

    q, k and v are projections of x behind a short convolution and silu, of length 1. The rate is
    max_inner_lr sigmoid(.), momentum and what decay leaves are sigmoid(.) of projections of x: at
    the start about half the largest rate, 0.1 and 0.98, so that the memory is stable and long.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, H = config, config.heads
        self.config, d = c, d_model // H
        if d_model % H:
            raise ConfigError(f"A memory of heads={H} does not divide d_model={d_model}.")
        hidden = max(int(d * c.expand), 1)
        self.qkv = Linear(d_model, 3 * d_model, ("embed", "heads"), rngs=rngs)
        self.conv = ShortConv(3 * d_model, c.conv_width, rngs=rngs) if c.conv_width else None
        self.gates = Linear(d_model, 3 * H, ("embed", "heads"), bias=True, rngs=rngs)
        start = jnp.repeat(jnp.array([0.0, -2.0, 4.0], jnp.float32), H)
        self.gates.bias = nnx.Param(start, axes=("heads",))
        self.layers = nnx.List(initial_layers(H, [d, *[hidden] * (c.depth - 1), d], rngs=rngs))

    def init_state(self, batch: int) -> State:
        conv = self.conv.init_state(batch) if self.conv else ()
        return State(conv, kernel.empty(batch, tuple(W[...] for W in self.layers)))

    def __call__(self, x, state: State, reset) -> tuple[jax.Array, State]:
        c, qkv, conv = self.config, self.qkv(x), state.conv
        if self.conv:
            qkv, conv = self.conv(qkv, conv, reset=reset)
        q, k, v = (heads(a, c.heads) for a in jnp.split(jax.nn.silu(qkv), 3, -1))
        rate, momentum, kept = jnp.split(widen(self.gates(x)), 3, -1)
        y, memory = kernel.test_time_memory(
            unit_length(q),
            unit_length(k),
            unit_length(v) if c.unit_values else v,
            c.max_inner_lr * jax.nn.sigmoid(rate),
            jax.nn.log_sigmoid(momentum),
            jax.nn.log_sigmoid(kept),
            reset,
            kernel.Weights(tuple(W[...] for W in self.layers)),
            state.memory,
            chunk_size=c.chunk_size,
            activation=c.activation,
            decay_to=c.decay_to,
            read=c.read,
            implementation=c.implementation,
        )
        return merge(y), State(conv, memory)


def initial_layers(n: int, sizes: list[int], *, std: float | None = None, rngs: nnx.Rngs) -> list:
    """What the networks of n heads start with: matrices from each size to the next, normal with
    standard deviation `std`, by default (the size that is read) ** -0.5."""
    normal = lambda i, o: jax.random.normal(rngs.params(), (n, i, o), jnp.float32)
    return [
        nnx.Param(normal(i, o) * (i**-0.5 if std is None else std), axes=("heads", None, None))
        for i, o in zip(sizes[:-1], sizes[1:], strict=True)
    ]
