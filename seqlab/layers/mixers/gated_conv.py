"""A gated short convolution without a memory beyond its taps: gated before and after it in LFM2
(Liquid AI, 2025), after it alone and behind a silu in Based's BaseConv (Arora et al., 2024)."""

from typing import NamedTuple

import jax
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
    """`expand` is the width of the convolution over the model's; `bias` is that of the convolution
    and of both projections. The defaults are LFM2's; BaseConv has `gate_before=False, silu=True`.
    """

    conv_width: PositiveInt = 3
    expand: PositiveInt = 1
    gate_before: bool = True
    silu: bool = False
    bias: bool = False

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedConv":
        return GatedConv(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the convolution


class GatedConv(Mixer):
    """b, c, u = x W_in;  y = (c * silu(conv(b * u))) W_out, without b or silu if the config says"""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        d, parts = c.expand * d_model, 2 + c.gate_before
        self.inner = Linear(d_model, parts * d, ("embed", "heads"), bias=c.bias, rngs=rngs)
        self.conv = ShortConv(d, c.conv_width, bias=c.bias, rngs=rngs)
        self.out = Linear(d, d_model, ("heads", "embed"), bias=c.bias, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return State(self.conv.init_state(batch))

    def mix(self, x, state: State, reset):
        c = self.config
        *before, after, u = jnp.split(self.inner(x), 2 + c.gate_before, -1)
        y, conv = self.conv(before[0] * u if before else u, state.conv, reset=reset)
        return self.out(after * (jax.nn.silu(y) if c.silu else y)), State(conv)
