"""minLSTM (Feng et al., 2024, "Were RNNs all we needed?"): an LSTM gated by the input alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.linear_scan import linear_scan
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`expand` * d_model channels, projected back unless that is d_model itself."""

    expand: PositiveFinite = 1.0
    positive: bool = True  # candidates pass g, as in the paper's log-space form; else as they are
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MinLSTM":
        if int(self.expand * d_model) < 1:
            raise ConfigError(
                f"min_lstm: expand = {self.expand} leaves no channel: make it larger."
            )
        return MinLSTM(self, d_model, rngs=rngs)


class State(NamedTuple):
    h: jax.Array  # [B, E]


class MinLSTM(Mixer):
    """h_t = f'_t h_{t-1} + i'_t g(x_t W_h);  y_t = h_t (W_out)

    f' = f / (f + i) and i' = i / (f + i), with f = sigmoid(x W_f) and i = sigmoid(x W_i);
    g(x) = x + 1/2 for x >= 0, else sigmoid(x), which keeps h positive (their appendix B).
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.inner = inner = int(config.expand * d_model)
        self.forget = Linear(d_model, inner, ("embed", "heads"), rngs=rngs)
        self.input = Linear(d_model, inner, ("embed", "heads"), rngs=rngs)
        self.candidate = Linear(d_model, inner, ("embed", "heads"), rngs=rngs)
        out = inner != d_model
        self.out = Linear(inner, d_model, ("heads", "embed"), rngs=rngs) if out else None

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.inner), jnp.float32))

    def mix(self, x, state: State, reset):
        new = widen(self.candidate(x))
        if self.config.positive:
            new = jnp.where(new >= 0, new + 0.5, jax.nn.sigmoid(new))
        # log f - log i, so that neither of two small gates is divided by their smaller sum
        balance = jax.nn.log_sigmoid(widen(self.forget(x)))
        balance -= jax.nn.log_sigmoid(widen(self.input(x)))
        h, last = linear_scan(
            jax.nn.sigmoid(balance),
            jax.nn.sigmoid(-balance) * new,
            reset,
            state.h,
            implementation=self.config.implementation,
        )
        y = h.astype(x.dtype)
        return (y if self.out is None else self.out(y)), State(last)
