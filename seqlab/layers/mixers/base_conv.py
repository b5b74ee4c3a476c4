"""BaseConv (Zoology, Arora et al., 2023): a short convolution gated by a projection of its input.

It cannot recall, but it puts each token beside those before it, which is what memories compared on
recall are given to read.
"""

from typing import NamedTuple

from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """`bias` is that of the convolution and of the projection."""

    conv_width: PositiveInt = 3
    bias: bool = True

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "BaseConv":
        return BaseConv(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the convolution


class BaseConv(Mixer):
    """y = conv(x) * (x W + b) + x"""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.conv = ShortConv(d_model, c.conv_width, bias=c.bias, rngs=rngs)
        self.projection = Linear(d_model, d_model, ("embed", "heads"), bias=c.bias, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return State(self.conv.init_state(batch))

    def mix(self, x, state: State, reset):
        y, conv = self.conv(x, state.conv, reset=reset)
        return y * self.projection(x) + x, State(conv)
