"""GRU (Cho et al., 2014) with heads, as in FlashRNN (Pöppel et al., 2024)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
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
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GRU":
        if d_model % self.heads:
            raise ConfigError(f"gru: d_model={d_model} does not divide by heads={self.heads}.")
        return GRU(self, d_model, rngs=rngs)


class State(NamedTuple):
    h: jax.Array  # [B, H, d]


class GRU(Mixer):
    """h_t = z h_{t-1} + (1 - z) tanh(W_n x_t + b_n + r (R_n h_{t-1} + b_g)),  y_t = W_out h_t

    with r, z = sigmoid(W x_t + R h_{t-1} + b), where R is block-diagonal over the heads: the
    variant whose reset gate acts after the product with R, as in cuDNN. R starts uniform in
    +-d^-0.5, d the width of a head; the biases at zero.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        H, d = c.heads, d_model // c.heads
        self.input = Linear(d_model, 3 * d_model, ("embed", "heads"), rngs=rngs)  # to H, 3, d
        bound = d**-0.5
        R = jax.random.uniform(rngs.params(), (H, d, 3, d), jnp.float32, -bound, bound)
        self.recurrent = Recurrent(
            R, jnp.zeros((H, 3, d), jnp.float32), cells.gru, c.implementation
        )
        zeros = jnp.zeros((H, d), jnp.float32)
        self.candidate_bias = nnx.Param(zeros, axes=("heads", None), decay=False)  # b_n
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        H, d, *_ = self.recurrent.R.shape
        return State(jnp.zeros((batch, H, d), jnp.float32))

    def mix(self, x, state: State, reset):
        H, d, G, _ = self.recurrent.R.shape
        wx = self.input(x).reshape(*x.shape[:2], H, G, d)
        wx = wx.at[..., 2, :].add(self.candidate_bias[...].astype(x.dtype))
        y, after = self.recurrent(wx, reset, state)
        return self.out(merge(y)), State(*after)
