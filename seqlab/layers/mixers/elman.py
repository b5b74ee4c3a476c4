"""The simple recurrent network (Elman, 1990) with heads, as in FlashRNN (Pöppel et al., 2024)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.fused_rnn import cells
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.recurrent import Recurrent
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """One head is the textbook's layer; more of them see each other through the output alone."""

    heads: PositiveInt = 4
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Elman":
        if d_model % self.heads:
            raise ConfigError(f"elman: d_model={d_model} does not divide by heads={self.heads}.")
        return Elman(self, d_model, rngs=rngs)


class State(NamedTuple):
    h: jax.Array  # [B, H, d]


class Elman(Mixer):
    """h_t = tanh(W x_t + R h_{t-1} + b),  y_t = W_out h_t

    where R is block-diagonal over the heads. R starts uniform in +-d^-0.5, d the width of a head.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        H, d = c.heads, d_model // c.heads
        self.input = Linear(d_model, d_model, ("embed", "heads"), rngs=rngs)
        bound = d**-0.5
        R = jax.random.uniform(rngs.params(), (H, d, 1, d), jnp.float32, -bound, bound)
        self.recurrent = Recurrent(
            R, jnp.zeros((H, 1, d), jnp.float32), cells.elman, c.implementation
        )
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        H, d, *_ = self.recurrent.R.shape
        return State(jnp.zeros((batch, H, d), jnp.float32))

    def mix(self, x, state: State, reset):
        wx = heads(self.input(x), self.config.heads)[:, :, :, None]
        y, after = self.recurrent(wx, reset, state)
        return self.out(merge(y)), State(*after)
