"""Root-mean-square normalisation (Zhang & Sennrich, 2019), reduced in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.kernels.precision import widen


class RMSNorm(nnx.Module):
    """x [..., D] -> x / sqrt(mean(x^2) + eps) * weight, in the dtype of x.

    With `groups`, the mean is taken within each of that many equal groups of channels.
    """

    def __init__(self, d: int, *, eps: float = 1e-6, groups: int = 1):
        self.weight = nnx.Param(jnp.ones(d, jnp.float32), axes=(None,))
        self.eps, self.groups = eps, groups

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x).reshape(*x.shape[:-1], self.groups, -1)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (wide.reshape(x.shape) * self.weight[...]).astype(x.dtype)
