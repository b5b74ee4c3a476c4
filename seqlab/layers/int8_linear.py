"""Linear maps in eight bits, but for the few inputs that are large: LLM.int8 (Dettmers et al.,
2022), which finds these anew for every batch; here they are found once, by calibration."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from seqlab.kernels.precision import widen
from seqlab.kernels.quantize import by_token
from seqlab.layers.linear import Linear, product
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """An input that is ever as large as `threshold` is an outlier. `outliers` says by the name of a
    projection (such as "down") how many of its inputs stay in sixteen bits: as many in all layers,
    so that they stack."""

    trained_as: ClassVar[str] = "dense"
    threshold: PositiveFinite = 6.0
    outliers: tuple[tuple[str, NonNegativeInt], ...] = ()
    head: bool = False

    def replace(self, linear: Linear, path: str) -> "Int8Linear":
        return Int8Linear(self._outliers(path), linear)

    def quantized(self, weight: jax.Array, path: str, largest: np.ndarray) -> dict[str, jax.Array]:
        """The arrays of an Int8Linear, from weights [..., d_in, d_out] and the largest |x| of each
        input [..., d_in]."""
        weight, n = widen(weight), self._outliers(path)
        outliers = jnp.argsort(-jnp.asarray(largest), axis=-1)[..., :n].astype(jnp.int32)
        chosen = outliers[..., None]
        rows = jnp.take_along_axis(weight, chosen, -2).astype(jnp.bfloat16)
        rest = jnp.put_along_axis(weight, chosen, 0, -2, inplace=False)
        scale = jnp.max(jnp.abs(rest), -2) / 127
        codes = jnp.round(rest / jnp.where(scale > 0, scale, 1)[..., None, :]).astype(jnp.int8)
        return {"codes": codes, "scale": scale, "outliers": outliers, "rows": rows}

    def _outliers(self, path: str) -> int:
        return dict(self.outliers).get(path.rpartition(".")[2], 0)


class Int8Linear(nnx.Module):
    """x [..., d_in] -> q(x without outliers) q(W) + x_outliers W_outliers + b, in the dtype of x.

    Each token and each output has a scale of its own. Empty, until it is filled with what
    `quantized` makes of weights.
    """

    def __init__(self, outliers: int, linear: Linear):
        (d_in, d_out), axes = linear.weight.shape, linear.weight.axes
        n = min(outliers, d_in)
        self.codes = nnx.Param(jnp.zeros((d_in, d_out), jnp.int8), axes=axes)
        self.scale = nnx.Param(jnp.zeros(d_out, jnp.float32), axes=axes[1:])
        self.outliers = nnx.Param(jnp.zeros(n, jnp.int32), axes=(None,))
        self.rows = nnx.Param(jnp.zeros((n, d_out), jnp.bfloat16), axes=(None, axes[1]))
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        outliers = self.outliers[...]
        codes, scale = by_token(x.at[..., outliers].set(0))
        whole = product(codes, self.codes[...], preferred_element_type=jnp.int32)
        y = whole.astype(jnp.float32) * (scale * self.scale[...])
        if outliers.size:
            y += product(widen(x[..., outliers]), widen(self.rows[...]))
        y = y.astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
