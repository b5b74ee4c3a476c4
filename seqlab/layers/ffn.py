"""The usual channel mixer of a block: a gated or plain two-layer perceptron (Shazeer, 2020)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.layers import norm as norms
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
    enters the activation and what leaves the layer (muP; Falcon-H1). `norm` norms what enters the
    last map (BitNet). With `joined`, up is one map to [gate, up], so that where maps are rounded,
    one scale rounds both (the MatMul-free LM).

    Weights start normal with standard deviation `std`, those of the last map with `down_std`; None
    is one over the square root of their inputs.
    """

    ratio: PositiveFinite = 8 / 3
    multiple_of: PositiveInt = 32
    width: PositiveInt | None = None
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    gate_gain: float = 1.0
    gain: float = 1.0
    norm: norms.Config | None = None
    joined: bool = False
    std: PositiveFinite | None = None
    down_std: PositiveFinite | None = None

    def __post_init__(self):
        if self.joined and not self.gated:
            raise ConfigError("ffn: joined = true joins a gate to the map beside it: set gated.")

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "FFN":
        return FFN(self, d_model, rngs=rngs)

    def inner(self, d_model: int) -> int:
        return self.width or -int(-d_model * self.ratio // self.multiple_of) * self.multiple_of

    def written_out(self, d_model: int) -> "Config":
        """What computes the same, its width a number, and nothing said of how it started."""
        sized = {"ratio": 8 / 3, "multiple_of": 32, "width": self.inner(d_model)}
        return dataclasses.replace(self, **sized, std=None, down_std=None)


class FFN(nnx.Module):
    """y = (act(x W_gate) * x W_up) W_down, or act(x W_up) W_down without a gate"""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        inner = c.inner(d_model)
        linear = lambda d_in, d_out, axes, std: Linear(
            d_in, d_out, axes, bias=c.bias, std=std, rngs=rngs
        )
        into = lambda d_out: linear(d_model, d_out, ("embed", "ffn"), c.std)
        self.gate = into(inner) if c.gated and not c.joined else None
        self.up = into(2 * inner if c.joined else inner)
        self.norm = c.norm.build(inner) if c.norm else None
        self.down = linear(inner, d_model, ("ffn", "embed"), c.down_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        c, (gate, up) = self.config, self._gate_and_up(x)
        h = ACTIVATIONS[c.activation](_times(gate, c.gate_gain))
        h = h if up is None else h * up
        h = h if self.norm is None else self.norm(h)
        return _times(self.down(h), c.gain)

    def _gate_and_up(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """What passes the activation, and what it multiplies."""
        up = self.up(x)
        if self.config.joined:
            gate, up = jnp.split(up, 2, -1)
            return gate, up
        return (up, None) if self.gate is None else (self.gate(x), up)


def _times(x: jax.Array, gain: float) -> jax.Array:
    return x if gain == 1.0 else x * gain
