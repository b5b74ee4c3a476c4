"""minGRU (Feng et al., 2024, "Were RNNs all we needed?"): a GRU gated by the input alone."""

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

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MinGRU":
        if int(self.expand * d_model) < 1:
            raise ConfigError(f"min_gru: expand = {self.expand} leaves no channel: make it larger.")
        return MinGRU(self, d_model, rngs=rngs)


class State(NamedTuple):
    h: jax.Array  # [B, E]


class MinGRU(Mixer):
    """h_t = (1 - z_t) h_{t-1} + z_t g(x_t W_h),  z_t = sigmoid(x_t W_z);  y_t = h_t (W_out)

    g(x) = x + 1/2 for x >= 0, else sigmoid(x), which keeps h positive (their appendix B).
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.inner = inner = int(config.expand * d_model)
        self.gate = Linear(d_model, inner, ("embed", "heads"), rngs=rngs)
        self.candidate = Linear(d_model, inner, ("embed", "heads"), rngs=rngs)
        out = inner != d_model
        self.out = Linear(inner, d_model, ("heads", "embed"), rngs=rngs) if out else None

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.inner), jnp.float32))

    def mix(self, x, state: State, reset):
        z, new = widen(self.gate(x)), widen(self.candidate(x))
        if self.config.positive:
            new = jnp.where(new >= 0, new + 0.5, jax.nn.sigmoid(new))
        keep, write = jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * new
        h, last = linear_scan(
            keep, write, reset, state.h, implementation=self.config.implementation
        )
        y = h.astype(x.dtype)
        return (y if self.out is None else self.out(y)), State(last)
