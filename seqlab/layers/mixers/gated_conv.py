"""The double-gated short convolution of LFM2 (Liquid AI, 2025): no memory beyond its taps."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """`bias` is that of the convolution and of both projections."""

    conv_width: PositiveInt = 3
    bias: bool = False

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedConv":
        return GatedConv(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the convolution


class GatedConv(Mixer):
    """b, c, u = x W_in;  y = (c * conv(b * u)) W_out"""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.inner = Linear(d_model, 3 * d_model, ("embed", "heads"), bias=c.bias, rngs=rngs)
        self.conv = ShortConv(d_model, c.conv_width, bias=c.bias, rngs=rngs)
        self.out = Linear(d_model, d_model, ("heads", "embed"), bias=c.bias, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return State(self.conv.init_state(batch))

    def mix(self, x, state: State, reset):
        before, after, u = jnp.split(self.inner(x), 3, -1)
        y, conv = self.conv(before * u, state.conv, reset=reset)
        return self.out(after * y), State(conv)
