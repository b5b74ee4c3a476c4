"""sLSTM (Beck et al., 2024): a scalar memory with exponential gates, and heads that mix inside."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.fused_rnn import cells
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import HeadwiseLinear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import LayerNorm
from seqlab.layers.recurrent import Recurrent
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """`depth` is where the block stands in its model, from 0, the first, to 1, the last: the deeper
    it is, the more of its channels start out with a long memory."""

    heads: PositiveInt = 4
    conv_width: NonNegativeInt = 4  # of the convolution before the i and f gates; 0 for none
    depth: Annotated[float, Field(ge=0, le=1)] = 0.5
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "SLSTM":
        if d_model % self.heads:
            raise ConfigError(f"slstm: d_model={d_model} does not divide by heads={self.heads}.")
        return SLSTM(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution, empty without one
    h: jax.Array  # [B, H, d], the output of the last step
    c: jax.Array  # [B, H, d], the cell, and
    n: jax.Array  # [B, H, d], the sum of its weights, both divided by
    m: jax.Array  # [B, H, d], the exponential of this


class SLSTM(Mixer):
    """c_t = f c_{t-1} + i tanh(z),  n_t = f n_{t-1} + i,  h_t = sigmoid(o) c_t / n_t

    with i = exp(.) and f = sigmoid(.). Every gate sees x_t and, within its head, R h_{t-1}; i and f
    see x_t after a short convolution and silu. y_t = norm(h_t), head by head. The block has no
    projection behind it: in the paper a gated perceptron follows.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        H, d = c.heads, d_model // c.heads
        std = (2 / (5 * d_model)) ** 0.5
        self.conv = ShortConv(d_model, c.conv_width, bias=True, rngs=rngs) if c.conv_width else None
        self.i_f = HeadwiseLinear(H, d, 2 * d, std=std, rngs=rngs)
        self.z_o = HeadwiseLinear(H, d, 2 * d, std=std, rngs=rngs)
        # a power law from 5, kept for long, to -7, forgotten at once
        channel = jnp.arange(d, dtype=jnp.float32) / max(d - 1, 1)
        forget = 5 - 12 * channel ** (0.3 + 1.3 * c.depth)
        bias = jnp.zeros((H, 4, d), jnp.float32).at[:, 1].set(forget)
        R = jnp.zeros((H, d, 4, d), jnp.float32)
        self.recurrent = Recurrent(R, bias, cells.slstm, c.implementation)
        self.norm = LayerNorm(d_model, eps=1e-5, groups=H, offset=True, bias=False)

    def init_state(self, batch: int) -> State:
        H, d, *_ = self.recurrent.R.shape
        zeros = (jnp.zeros((batch, H, d), jnp.float32) for _ in "hcnm")
        return State(self.conv.init_state(batch) if self.conv else (), *zeros)

    def mix(self, x, state: State, reset):
        H, seen, conv = self.config.heads, x, state.conv
        if self.conv:
            seen, conv = self.conv(x, conv, reset=reset)
            seen = jax.nn.silu(seen)
        gates = lambda a: a.reshape(*a.shape[:-1], 2, -1)  # [B, T, H, 2 d] -> [B, T, H, 2, d]
        i_f, z_o = gates(self.i_f(heads(seen, H))), gates(self.z_o(heads(x, H)))
        wx = jnp.concatenate([i_f, z_o], -2)
        y, (h, c, n, m) = self.recurrent(wx, reset, (state.h, state.c, state.n, state.m))
        return self.norm(merge(y)), State(conv, h, c, n, m)
