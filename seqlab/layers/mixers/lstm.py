"""LSTM (Hochreiter & Schmidhuber, 1997) with heads, as in FlashRNN (Pöppel et al., 2024)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import FiniteFloat, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.fused_rnn import cells
from seqlab.layers.linear import Linear, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.recurrent import Recurrent
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """One head is the textbook's layer; more of them see each other through the output alone."""

    heads: PositiveInt = 4
    forget_bias: FiniteFloat = 1.0  # at the start, so that memories last (Jozefowicz et al., 2015)
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "LSTM":
        if d_model % self.heads:
            raise ConfigError(f"lstm: d_model={d_model} does not divide by heads={self.heads}.")
        return LSTM(self, d_model, rngs=rngs)


class State(NamedTuple):
    h: jax.Array  # [B, H, d]
    c: jax.Array  # [B, H, d]


class LSTM(Mixer):
    """c_t = f c_{t-1} + i tanh(z),  h_t = o tanh(c_t),  y_t = W_out h_t

    with i, f, o = sigmoid(.). Every gate is W x_t + R h_{t-1} + b, where R is block-diagonal over
    the heads. R starts uniform in +-d^-0.5, d the width of a head.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        H, d = c.heads, d_model // c.heads
        self.input = Linear(d_model, 4 * d_model, ("embed", "heads"), rngs=rngs)  # to H, 4, d
        bound = d**-0.5
        R = jax.random.uniform(rngs.params(), (H, d, 4, d), jnp.float32, -bound, bound)
        bias = jnp.zeros((H, 4, d), jnp.float32).at[:, 1].set(c.forget_bias)
        self.recurrent = Recurrent(R, bias, cells.lstm, c.implementation)
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        H, d, *_ = self.recurrent.R.shape
        return State(*(jnp.zeros((batch, H, d), jnp.float32) for _ in "hc"))

    def mix(self, x, state: State, reset):
        H, d, G, _ = self.recurrent.R.shape
        wx = self.input(x).reshape(*x.shape[:2], H, G, d)
        y, after = self.recurrent(wx, reset, state)
        return self.out(merge(y)), State(*after)
