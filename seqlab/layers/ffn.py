"""The usual channel mixer of a block: a gated or plain two-layer perceptron (Shazeer, 2020)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.layers.linear import Linear
from seqlab.settings import STRICT, PositiveFinite

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, config=STRICT)
class Config:
    """The inner width is `width`, or else `ratio` times the model's, rounded up to `multiple_of`.

    "silu" and gated is SwiGLU, "gelu_tanh" and gated GeGLU. `gate_gain` and `gain` multiply what
    enters the activation and what leaves the layer (muP; Falcon-H1).
    """

    ratio: PositiveFinite = 8 / 3
    multiple_of: PositiveInt = 32
    width: PositiveInt | None = None
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    gate_gain: float = 1.0
    gain: float = 1.0

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "FFN":
        return FFN(self, d_model, rngs=rngs)

    def inner(self, d_model: int) -> int:
        return self.width or -int(-d_model * self.ratio // self.multiple_of) * self.multiple_of


class FFN(nnx.Module):
    """y = (act(x W_gate) * x W_up) W_down, or act(x W_up) W_down without a gate"""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        inner = c.inner(d_model)
        linear = lambda d_in, d_out, *axes: Linear(d_in, d_out, axes, bias=c.bias, rngs=rngs)
        self.gate = linear(d_model, inner, "embed", "ffn") if c.gated else None
        self.up = linear(d_model, inner, "embed", "ffn")
        self.down = linear(inner, d_model, "ffn", "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        act, c, up = ACTIVATIONS[self.config.activation], self.config, self.up(x)
        if self.gate is None:
            h = act(_times(up, c.gate_gain))
        else:
            h = act(_times(self.gate(x), c.gate_gain)) * up
        return _times(self.down(h), c.gain)


def _times(x: jax.Array, gain: float) -> jax.Array:
    return x if gain == 1.0 else x * gain
