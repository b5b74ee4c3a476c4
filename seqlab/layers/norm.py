"""Normalisations, reduced in float32: RMSNorm (Zhang & Sennrich, 2019), LayerNorm (Ba, 2016)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.kernels.precision import widen
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """kind "rms" or "layer"; `offset` where weights are stored as their distance from one (Gemma);
    `bias` is for "layer" alone."""

    kind: Literal["rms", "layer"] = "rms"
    eps: PositiveFinite = 1e-6
    offset: bool = False
    bias: bool = True

    def build(self, d: int) -> "RMSNorm | LayerNorm":
        if self.kind == "rms":
            return RMSNorm(d, eps=self.eps, offset=self.offset)
        return LayerNorm(d, eps=self.eps, offset=self.offset, bias=self.bias)


class RMSNorm(nnx.Module):
    """x [..., D] -> x / sqrt(mean(x^2) + eps) * weight, in the dtype of x.

    With `groups`, the mean is taken within each of that many equal groups of channels. With
    `offset`, the factor is 1 + weight and the weight starts at zero. Without `weight` there is no
    factor.
    """

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-6,
        groups: int = 1,
        offset: bool = False,
        weight: bool = True,
    ):
        start = jnp.full(d, 1.0 - offset, jnp.float32)
        self.weight = nnx.Param(start, axes=(None,)) if weight else None
        self.eps, self.groups, self.offset = eps, groups, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x).reshape(*x.shape[:-1], self.groups, -1)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        wide = wide.reshape(x.shape)
        if self.weight is not None:
            wide *= self.weight[...] + self.offset
        return wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """x [..., D] -> (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in the dtype of x.

    With `groups`, mean and variance are taken within each of that many equal groups of channels (a
    GroupNorm over heads). With `offset`, the factor is 1 + weight and the weight starts at zero.
    Without `weight` there is no factor.
    """

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-5,
        groups: int = 1,
        offset: bool = False,
        weight: bool = True,
        bias: bool = True,
    ):
        start = jnp.full(d, 1.0 - offset, jnp.float32)
        self.weight = nnx.Param(start, axes=(None,)) if weight else None
        self.bias = nnx.Param(jnp.zeros(d, jnp.float32), axes=(None,)) if bias else None
        self.eps, self.groups, self.offset = eps, groups, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x).reshape(*x.shape[:-1], self.groups, -1)
        wide -= jnp.mean(wide, -1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        wide = wide.reshape(x.shape)
        if self.weight is not None:
            wide *= self.weight[...] + self.offset
        return (wide if self.bias is None else wide + self.bias[...]).astype(x.dtype)


def unit_length(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x [..., D] / sqrt(sum(x^2) + eps), in the dtype of x."""
    wide = widen(x)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), -1, keepdims=True) + eps)).astype(
        x.dtype
    )
