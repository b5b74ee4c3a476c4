"""The channel mixer of a block: SwiGLU (Shazeer, 2020)."""

import jax
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.layers.linear import Linear
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`ratio` is inner width over model width; the inner width is rounded up to `multiple_of`."""

    ratio: PositiveFinite = 8 / 3
    multiple_of: PositiveInt = 32

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "SwiGLU":
        inner = -int(-d_model * self.ratio // self.multiple_of) * self.multiple_of
        return SwiGLU(d_model, inner, rngs=rngs)


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * x W_up) W_down"""

    def __init__(self, d_model: int, d_inner: int, *, rngs: nnx.Rngs):
        self.gate = Linear(d_model, d_inner, ("embed", "ffn"), rngs=rngs)
        self.up = Linear(d_model, d_inner, ("embed", "ffn"), rngs=rngs)
        self.down = Linear(d_inner, d_model, ("ffn", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
