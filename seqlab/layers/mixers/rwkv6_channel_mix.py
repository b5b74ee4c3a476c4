"""The channel mix of RWKV-6 (Peng et al., 2024): a perceptron that sees the token before, too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.token_shift import previous
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """The inner width is `width`, or else `ratio` times the model's, rounded up to 32; this is
    layer `layer` of `layers`, which says where the mixing weights start."""

    ratio: PositiveFinite = 3.5
    width: PositiveInt | None = None
    layer: NonNegativeInt = 0
    layers: PositiveInt = 1

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"rwkv6_channel_mix: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "ChannelMix":
        return ChannelMix(self, d_model, rngs=rngs)


class State(NamedTuple):
    previous: jax.Array  # [B, D]


class ChannelMix(Mixer):
    """y_t = sigmoid(x^r_t W_r) * (relu(x^k_t W_k)^2 W_v),  x^i_t = x_t + (x_{t-1} - x_t) mu_i"""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        inner = c.width or -int(-d_model * c.ratio // 32) * 32
        channel = jnp.arange(d_model, dtype=jnp.float32) / d_model
        mu = 1 - channel ** (1 - c.layer / c.layers)
        self.mu_k, self.mu_r = (nnx.Param(mu, axes=(None,)) for _ in "kr")
        self.key = Linear(d_model, inner, ("embed", "ffn"), rngs=rngs)
        self.value = Linear(inner, d_model, ("ffn", "embed"), rngs=rngs)
        self.receptance = Linear(d_model, d_model, ("embed", "heads"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.mu_k.shape[0]), jnp.float32))

    def mix(self, x, state: State, reset):
        before, last = previous(x, state.previous, reset)
        seen = lambda mu: x + (before - x) * mu[...].astype(x.dtype)
        h = jnp.square(jax.nn.relu(self.key(seen(self.mu_k))))
        return jax.nn.sigmoid(self.receptance(seen(self.mu_r))) * self.value(h), State(last)
