"""Linear maps whose weights are a few planes of -1, 0 and 1 with scales: PTQTP (Xiao et al., 2025),
for any trained model, without data."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.kernels.ternary_matmul.packing import pack, rows, unpack
from seqlab.kernels.trit_planes import fit, restored
from seqlab.layers.linear import Linear, product
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """`planes` for each projection, but for those that `planes_of` names (such as "down"); `group`
    inputs share a scale of each plane."""

    trained_as: ClassVar[str] = "dense"
    planes: PositiveInt = 3
    planes_of: tuple[tuple[str, PositiveInt], ...] = ()
    group: PositiveInt = 128
    head: bool = False

    def replace(self, linear: Linear, path: str) -> "PTQTPLinear":
        return PTQTPLinear(self._planes(path), self.group, linear)

    def quantized(self, weight: jax.Array, path: str) -> dict[str, jax.Array]:
        """The arrays of a PTQTPLinear, from weights [..., d_in, d_out]."""

        def one(weight):
            trits, scales = fit(weight, self._planes(path), self.group)
            return {"planes": pack(trits), "scales": scales.astype(jnp.bfloat16)}

        each = weight.reshape(-1, *weight.shape[-2:])
        with jax.enable_x64(True):
            stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(one, each))
        return jax.tree.map(lambda a: a.reshape(*weight.shape[:-2], *a.shape[1:]), stacked)

    def _planes(self, path: str) -> int:
        return dict(self.planes_of).get(path.rpartition(".")[2], self.planes)


class PTQTPLinear(nnx.Module):
    """x [..., d_in] -> x (sum_p scales_p planes_p) + b [..., d_out], in the dtype of x.

    Weights are restored where they are used. Empty, until it is filled with what `quantized` makes
    of weights.
    """

    def __init__(self, planes: int, group: int, linear: Linear):
        (d_in, d_out), axes = linear.weight.shape, linear.weight.axes
        codes = jnp.zeros((planes, rows(d_in), d_out), jnp.uint8)
        self.planes = nnx.Param(codes, axes=(None, *axes))
        scales = jnp.zeros((planes, -(-d_in // group), d_out), jnp.bfloat16)
        self.scales = nnx.Param(scales, axes=(None, None, axes[1]))
        self.bias = linear.bias
        self.group = group

    def __call__(self, x: jax.Array) -> jax.Array:
        trits = unpack(self.planes[...], x.shape[-1])
        y = product(x, restored(trits, self.scales[...], self.group).astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
