"""TTT-Linear and TTT-MLP (Sun et al., 2024): a state that is a model, fitted to each document while
it is read."""

from typing import NamedTuple

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
from seqlab.layers.mixer import Mixer
from seqlab.layers.neural_memory import initial_layers
from seqlab.layers.norm import LayerNorm
from seqlab.layers.rope import positions, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """depth 1 is TTT-Linear; 2 is TTT-MLP, `expand` times as wide inside as a head. Gradients are
    taken at the weights with which a chunk of `chunk_size` tokens began. base_lr defaults to the
    published 1.0 for the first and 0.1 for the second (there after a warm-up from 0.01).
    """

    heads: PositiveInt = 4
    depth: PositiveInt = 1
    expand: PositiveFinite = 4.0
    base_lr: PositiveFinite | None = None
    conv_width: NonNegativeInt = 4  # of the convolutions that tell q and k apart; 0 for none
    rope_base: PositiveFinite | None = 10_000.0  # of positions within a chunk; None for none
    norm_eps: PositiveFinite = 1e-6
    chunk_size: PositiveInt = 16
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "TTT":
        if d_model % self.heads or (self.rope_base is not None and d_model // self.heads % 2):
            raise ConfigError(
                f"ttt: d_model={d_model} does not divide into heads={self.heads} of even width."
            )
        return TTT(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the states of the convolutions of q and of k, empty without them
    memory: kernel.State


class TTT(Mixer):
    """f(x) = x + norm(model(x)), with a linear model or an MLP for each head, and the loss
    1/2 |f(k) - v|^2. For tokens j <= i of a chunk that begins with the weights W',

        W_i = W' - s_i sum_{j <= i} rate_j grad loss_j(W'),    s_i = max(1/(i + 1) + delta_i, 0)

    y_t = (norm(f_{W_t}(q_t)) * gelu(x_t W_gate)) W_out, rate = base_lr sigmoid(x W_lr + b) / width.
    q and k are one projection of x behind a convolution each, and turn with the place in the chunk.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, H, d = config, config.heads, d_model // config.heads
        self.config, split = c, ("embed", "heads")
        project = lambda n, **options: Linear(d_model, n, split, std=0.02, rngs=rngs, **options)
        self.qk, self.v, self.gate = (project(d_model) for _ in range(3))
        self.lr = project(H, bias=True)
        conv = lambda: ShortConv(d_model, c.conv_width, bias=True, rngs=rngs)
        self.convs = nnx.List([conv(), conv()] if c.conv_width else [])
        sizes = [d, *[max(int(d * c.expand), 1)] * (c.depth - 1), d]
        self.layers = nnx.List(initial_layers(H, sizes, std=0.02, bias=True, rngs=rngs))
        per_head = lambda start: nnx.Param(start, axes=("heads", None), decay=False)
        self.inner_weight = per_head(jnp.ones((H, d), jnp.float32))
        self.inner_bias = per_head(jnp.zeros((H, d), jnp.float32))
        self.delta = nnx.Param(jnp.zeros(c.chunk_size, jnp.float32), axes=(None,))
        self.norm = LayerNorm(d_model, eps=c.norm_eps)
        self.out = Linear(d_model, d_model, ("heads", "embed"), std=0.02, rngs=rngs)

    def init_state(self, batch: int) -> State:
        conv = tuple(conv.init_state(batch) for conv in self.convs)
        return State(conv, kernel.empty(batch, tuple(self.layers), start=False))

    def mix(self, x, state: State, reset):
        c, memory = self.config, state.memory
        qk, convs = self.qk(x), state.conv
        behind = [conv(qk, s, reset=reset) for conv, s in zip(self.convs, convs, strict=True)]
        q, k = (heads(a, c.heads) for a in ([a for a, _ in behind] or [qk, qk]))
        if c.rope_base is not None:
            place = positions(reset, memory.phase[:, 0]) % c.chunk_size
            q, k = (rope(a, place, c.rope_base) for a in (q, k))
        base = c.base_lr or (1.0 if c.depth == 1 else 0.1)
        rate = base * jax.nn.sigmoid(widen(self.lr(x))) / q.shape[-1]
        scale = jnp.maximum(1 / jnp.arange(1, c.chunk_size + 1) + self.delta[...], 0)
        weights = kernel.Weights(
            tuple(W[...] for W in self.layers), (self.inner_weight[...], self.inner_bias[...])
        )
        y, memory = kernel.test_time_training(
            *(q, k, heads(self.v(x), c.heads), rate, reset, weights, scale[None], memory),
            implementation=c.implementation,
        )
        y = self.norm(merge(y)) * jax.nn.gelu(self.gate(x))
        return self.out(y), State(tuple(s for _, s in behind), memory)
