"""Feature maps: phi(q) . phi(k) in the place of exp(q . k), which makes attention linear.

elu (Katharopoulos et al., 2020), dpfp (Schlag et al., 2021), t2r (Kasai et al., 2021), hedgehog
(Zhang et al., 2024), taylor (Based, Arora et al., 2024), rebased (Aksenov et al., 2024).
"""

import abc
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.kernels.precision import widen
from seqlab.layers.norm import LayerNorm
from seqlab.settings import STRICT

Kind = Literal[
    "elu",
    "relu",
    "identity",
    "softmax",
    "dpfp",
    "taylor",
    "t2r",
    "hedgehog",
    "elementwise_product",
    "rebased",
]

#: Kinds whose phi(q) . phi(k) may be negative: nothing should be divided by sums of them.
SIGNED = ("identity", "elementwise_product")


@dataclass(frozen=True, config=STRICT)
class Config:
    """The learned maps t2r, hedgehog and elementwise_product project a head to `width` channels,
    its own unless given; with `per_head` each head has a projection of its own."""

    kind: Kind = "elu"
    width: PositiveInt | None = None
    per_head: bool = False
    bias: bool = True
    joint: bool = True  # hedgehog: one softmax over both signs of 2 z; or else one for each of z
    nu: PositiveInt = 4  # dpfp: how far channels are rolled

    def build(self, d: int, heads: int, *, rngs: nnx.Rngs) -> "FeatureMap":
        """A map of heads of width d."""
        match self.kind:
            case "t2r":
                return T2R(self, d, heads, rngs=rngs)
            case "hedgehog":
                return Hedgehog(self, d, heads, rngs=rngs)
            case "elementwise_product":
                return ElementwiseProduct(self, d, heads, rngs=rngs)
            case "rebased":
                return Rebased(d)
        return Fixed(self, d)


class FeatureMap(nnx.Module):
    """x [B, T, H, d] -> phi(x) [B, T, H, width] in the dtype of x"""

    width: int

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.features(x).astype(x.dtype)

    @abc.abstractmethod
    def features(self, x: jax.Array) -> jax.Array:
        """phi(x), in any dtype."""


class Fixed(FeatureMap):
    """The maps without weights."""

    def __init__(self, config: Config, d: int):
        self.kind, self.nu = config.kind, config.nu
        widths = {"dpfp": 2 * d * config.nu, "taylor": 1 + d + d * (d + 1) // 2}
        self.width = widths.get(config.kind, d)

    def features(self, x):
        x = widen(x)
        match self.kind:
            case "elu":
                return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
            case "relu":
                return jax.nn.relu(x)
            case "softmax":
                return jax.nn.softmax(x)
            case "dpfp":
                both = jax.nn.relu(jnp.concatenate([x, -x], -1))
                rolled = [both * jnp.roll(both, j, -1) for j in range(1, self.nu + 1)]
                return jnp.concatenate(rolled, -1)
            case "taylor":
                return _taylor(x)
        return x


class T2R(FeatureMap):
    """relu(x W + b)"""

    def __init__(self, config: Config, d: int, heads: int, *, rngs: nnx.Rngs):
        self.width = config.width or d
        self.project = Projection(config, d, heads, jnp.eye(d, self.width), rngs=rngs)

    def features(self, x):
        return jax.nn.relu(self.project(x))


class Hedgehog(FeatureMap):
    """softmax([2 z, -2 z]), or [softmax(z), softmax(-z)], of z = x W + b; W starts as identity"""

    def __init__(self, config: Config, d: int, heads: int, *, rngs: nnx.Rngs):
        width = config.width or d
        self.width, self.joint = 2 * width, config.joint
        self.project = Projection(config, d, heads, jnp.eye(d, width), rngs=rngs)

    def features(self, x):
        z = widen(self.project(x))
        if self.joint:
            return jax.nn.softmax(jnp.concatenate([2 * z, -2 * z], -1))
        return jnp.concatenate([jax.nn.softmax(z), jax.nn.softmax(-z)], -1)


class ElementwiseProduct(FeatureMap):
    """(x W_1 + b_1) * (x W_2 + b_2)"""

    def __init__(self, config: Config, d: int, heads: int, *, rngs: nnx.Rngs):
        self.width = config.width or d
        self.first, self.second = (Projection(config, d, heads, None, rngs=rngs) for _ in range(2))

    def features(self, x):
        return self.first(x) * self.second(x)


class Rebased(FeatureMap):
    """The squares and products of a layer norm's channels: a learned quadratic kernel."""

    def __init__(self, d: int):
        self.width = d * (d + 1) // 2
        self.norm = LayerNorm(d)

    def features(self, x):
        squares, products = _second_order(self.norm(widen(x)))
        return jnp.concatenate([squares, math.sqrt(2) * products], -1) * x.shape[-1] ** -0.5


class Projection(nnx.Module):
    """x [B, T, H, d] -> x W + b [B, T, H, width]: one W for all heads, or one each.

    W starts as `start`, or else normal with standard deviation d ** -0.5.
    """

    def __init__(self, config: Config, d: int, heads: int, start, *, rngs: nnx.Rngs):
        front, axes = ((heads,), ("heads",)) if config.per_head else ((), ())
        shape = (*front, d, config.width or d)
        if start is None:
            weight = jax.random.normal(rngs.params(), shape, jnp.float32) * d**-0.5
        else:
            weight = jnp.broadcast_to(start, shape)
        self.weight = nnx.Param(weight, axes=(*axes, None, None))
        bias = jnp.zeros((*front, shape[-1]), jnp.float32)
        self.bias = nnx.Param(bias, axes=(*axes, None), decay=False) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...].astype(x.dtype)
        y = jnp.einsum("bthd,hdf->bthf" if weight.ndim == 3 else "bthd,df->bthf", x, weight)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _taylor(x: jax.Array) -> jax.Array:
    """phi(q) . phi(k) = 1 + q . k / sqrt(d) + (q . k)^2 / (2 d)"""
    squares, products = _second_order(x)
    root = x.shape[-1] ** 0.5
    parts = [jnp.ones_like(x[..., :1]), x / root**0.5, squares / (2**0.5 * root), products / root]
    return jnp.concatenate(parts, -1)


def _second_order(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x_i^2, and x_i x_j for i < j"""
    i, j = np.triu_indices(x.shape[-1], 1)
    return jnp.square(x), x[..., i] * x[..., j]
