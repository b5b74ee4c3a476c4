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
from seqlab.kernels.test_time_memory import dual
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
        return State(conv, kernel.empty(batch, tuple(self.layers)))

    def __call__(self, x, state: State, reset) -> tuple[jax.Array, State]:
        c, qkv, conv = self.config, self.qkv(x), state.conv
        if self.conv:
            qkv, conv = self.conv(qkv, conv, reset=reset)
        y, memory = kernel.test_time_memory(
            *self._asked(qkv),
            *self._gates(x),
            reset,
            self.weights,
            state.memory,
            chunk_size=c.chunk_size,
            activation=c.activation,
            decay_to=c.decay_to,
            read=c.read,
            implementation=c.implementation,
        )
        return merge(y), State(conv, memory)

    def window(self, x, reset, place, valid, state) -> tuple[jax.Array, tuple]:
        """The same for one window of `scan_segments`: state is that of the convolution, and the
        weights, momentum and start of `kernel.State`."""
        (conv, *memory), qkv, c = state, self.qkv(x), self.config
        seen = qkv
        if self.conv:
            seen, _ = self.conv(qkv, conv, reset=reset)
            conv = conv._replace(inputs=_inputs(conv.inputs, qkv, reset & valid, valid))
        q, k, v = self._asked(seen)
        tokens = v, q, k, jnp.stack(self._gates(x), -1)
        options = dual.Options(c.activation, c.decay_to, c.read)
        y, memory = dual.with_momentum(options, tokens, reset, place, valid, self.weights, memory)
        return merge(y).astype(x.dtype), (conv, *memory)

    def recall(self, q, reset, place, valid, state) -> jax.Array:
        """What the weights with which the segment began answer to q [B, T, D] in a window."""
        options, q = dual.Options(self.config.activation), heads(q, self.config.heads)
        at = unit_length(jax.nn.silu(q)), reset, place, valid
        return merge(dual.recall(options, *at, self.weights, state[1:])).astype(q.dtype)

    @property
    def weights(self) -> kernel.Weights:
        """What a document starts with."""
        return kernel.Weights(tuple(W[...] for W in self.layers))

    def _asked(self, qkv):
        q, k, v = (heads(a, self.config.heads) for a in jnp.split(jax.nn.silu(qkv), 3, -1))
        return unit_length(q), unit_length(k), unit_length(v) if self.config.unit_values else v

    def _gates(self, x):
        rate, momentum, kept = jnp.split(widen(self.gates(x)), 3, -1)
        rate = self.config.max_inner_lr * jax.nn.sigmoid(rate)
        return rate, jax.nn.log_sigmoid(momentum), jax.nn.log_sigmoid(kept)


def _inputs(old, new, reset, valid):
    """The last W - 1 inputs [B, W - 1, D] of the document after those of `new` that are valid."""
    kept, count = old.shape[1], jnp.sum(valid, 1, keepdims=True)
    at = count + jnp.arange(kept)  # among old and new, in order of time
    began = jnp.max(jnp.where(reset, jnp.arange(new.shape[1]), -kept), 1, keepdims=True) + kept
    both = jnp.concatenate([old, new.astype(old.dtype)], 1)
    return jnp.where((at < began)[..., None], 0, jnp.take_along_axis(both, at[..., None], 1))


def initial_layers(
    n: int, sizes: list[int], *, std: float | None = None, bias: bool = False, rngs: nnx.Rngs
) -> list[nnx.Param]:
    """What the networks of n heads start with: a matrix from each size to the next, normal with
    standard deviation `std`, by default (the size that is read) ** -0.5; and, with `bias`, one row
    more, of zeros."""

    def layer(i: int, o: int):
        matrix = jax.random.normal(rngs.params(), (n, i, o), jnp.float32)
        matrix *= i**-0.5 if std is None else std
        matrix = jnp.pad(matrix, [(0, 0), (0, int(bias)), (0, 0)])
        return nnx.Param(matrix, axes=("heads", None, None))

    return [layer(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
