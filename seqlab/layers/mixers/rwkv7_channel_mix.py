"""The channel mix of RWKV-7 (Peng et al., 2025): a squared ReLU that sees the token before, too."""

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
    """The inner width is `width`, or else `ratio` times the model's; this is layer `layer` of
    `layers`, which says where the mixing weights start."""

    ratio: PositiveFinite = 4.0
    width: PositiveInt | None = None
    layer: NonNegativeInt = 0
    layers: PositiveInt = 1

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"rwkv7_channel_mix: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "ChannelMix":
        return ChannelMix(self, d_model, rngs=rngs)


class State(NamedTuple):
    previous: jax.Array  # [B, D]


class ChannelMix(Mixer):
    """y_t = relu((x_t + (x_{t-1} - x_t) mu) W_key)^2 W_value"""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        inner = c.width or int(d_model * c.ratio)
        channel = jnp.arange(d_model, dtype=jnp.float32) / d_model
        mu = 1 - channel ** ((1 - c.layer / c.layers) ** 4)
        self.mu = nnx.Param(mu, axes=(None,))
        self.key = Linear(d_model, inner, ("embed", "ffn"), rngs=rngs)
        self.value = Linear(inner, d_model, ("ffn", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.mu.shape[0]), jnp.float32))

    def mix(self, x, state: State, reset):
        before, last = previous(x, state.previous, reset)
        seen = x + (before - x) * self.mu[...].astype(x.dtype)
        return self.value(jnp.square(jax.nn.relu(self.key(seen)))), State(last)
