"""What a trained `bit_linear` becomes: its weights -1, 0 and 1, four to a byte."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.kernels.precision import widen
from seqlab.kernels.quantize import by_token, ternary
from seqlab.kernels.ternary_matmul import ternary_matmul
from seqlab.kernels.ternary_matmul.packing import pack, rows
from seqlab.layers import bit_linear
from seqlab.layers.linear import Linear
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config(bit_linear.Config):
    """Fields as those of the maps that were trained."""

    trained_as: ClassVar[str] = "bit"

    def replace(self, linear: Linear, path: str) -> "TernaryLinear":
        return TernaryLinear(self, linear)

    def quantized(self, weight: jax.Array, path: str) -> dict[str, jax.Array]:
        """The arrays of a TernaryLinear, from weights [..., d_in, d_out]."""
        one = lambda weight: dict(zip(("codes", "scale"), ternary(weight), strict=True))
        for _ in weight.shape[:-2]:
            one = jax.vmap(one)
        arrays = one(weight)
        return {**arrays, "codes": pack(arrays["codes"])}


class TernaryLinear(nnx.Module):
    """x [..., d_in] -> y [..., d_out] in the dtype of x, of a BitLinear the very numbers.

    Empty, until it is filled with what `quantized` makes of weights.
    """

    def __init__(self, config: Config, linear: Linear):
        (d_in, d_out), axes = linear.weight.shape, linear.weight.axes
        self.norm = RMSNorm(d_in, eps=config.eps) if config.norm else None
        self.codes = nnx.Param(jnp.zeros((rows(d_in), d_out), jnp.uint8), axes=axes)
        self.scale = nnx.Param(jnp.zeros((), jnp.float32), axes=())
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        read = widen(x)
        codes, scale = by_token(read if self.norm is None else self.norm(read))
        whole = ternary_matmul(codes, self.codes[...]).astype(jnp.float32)
        y = (whole * (scale * self.scale[...])).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
