"""Linear maps with weights -1, 0, 1 and eight-bit activations: BitNet b1.58 (Ma et al., 2024), each
with a norm of its own as in the MatMul-free LM (Zhu et al., 2024)."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.kernels.kept import kept
from seqlab.kernels.precision import widen
from seqlab.kernels.quantize import by_token, ternary
from seqlab.layers.linear import Linear, product
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`norm` gives each map an RMSNorm of what it reads, as in the MatMul-free LM; BitNet has none.
    `head` is whether an untied head is such a map too."""

    trained_as: ClassVar[str | None] = None
    norm: bool = True
    eps: PositiveFinite = 1e-8
    head: bool = True

    def replace(self, linear: Linear, path: str) -> "BitLinear":
        return BitLinear(self, linear)


class BitLinear(nnx.Module):
    """x [..., d_in] -> q(norm(x)) t(W) + b [..., d_out], in the dtype of x; see `bit_product`.

    It trains the weights of the linear map whose place it takes, by the same names and axes.
    """

    def __init__(self, config: Config, linear: Linear):
        d_in = linear.weight.shape[0]
        self.norm = RMSNorm(d_in, eps=config.eps) if config.norm else None
        self.weight = linear.weight
        self.bias = linear.bias
        self.eps = config.eps

    def __call__(self, x: jax.Array) -> jax.Array:
        norm = self.norm and self.norm.weight
        gain = None if norm is None else norm[...]
        y: Any = bit_product(self.eps, x, self.weight[...], gain)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def definition(eps: float, x: jax.Array, weight: jax.Array, gain: jax.Array | None) -> jax.Array:
    """q(norm(x)) t(weight) with straight-through gradients: both roundings count as identities."""
    x, dtype = _normed(eps, x, gain), x.dtype
    through = lambda a, codes, scale: a + jax.lax.stop_gradient(codes * scale - a)
    return product(through(x, *by_token(x)), through(widen(weight), *ternary(weight))).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def bit_product(eps: float, x: jax.Array, weight: jax.Array, gain: jax.Array | None) -> jax.Array:
    """`definition`, summed in whole numbers, which is exact: y [..., d_out] in the dtype of x.

    x       [..., d_in]
    weight  [d_in, d_out], rounded to its mean |W| times -1, 0 or 1
    gain    [d_in], of the norm before; None is no norm

    The backward pass keeps x alone, and norms and rounds it again: neither the normed nor the
    rounded activations are ever held.
    """
    codes, scale = by_token(_normed(eps, x, gain))
    weight_codes, weight_scale = ternary(weight)
    whole = jax.lax.platform_dependent(
        *(codes, weight_codes), cpu=_float_product, default=_integer_product
    )
    return (whole * (scale * weight_scale)).astype(x.dtype)


def _forward(eps, x, weight, gain):
    return kept(bit_product(eps, x, weight, gain)), (x, weight, gain)


def _backward(eps, saved, dy):
    x, weight, gain = saved
    hat, to_inputs = jax.vjp(functools.partial(_normed, eps), x, gain)
    rounded = lambda codes, scale: (codes * scale).astype(x.dtype)
    _, to_factors = jax.vjp(product, rounded(*by_token(hat)), rounded(*ternary(weight)))
    d_hat, d_weight = to_factors(dy)
    dx, d_gain = to_inputs(d_hat.astype(hat.dtype))
    return dx, d_weight.astype(weight.dtype), d_gain


bit_product.defvjp(_forward, _backward)


def _normed(eps: float, x: jax.Array, gain: jax.Array | None) -> jax.Array:
    """x, or its RMSNorm, in float32 or wider."""
    wide = widen(x)
    if gain is None:
        return wide
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps) * gain


def _integer_product(codes, weight_codes):
    return product(codes, weight_codes, preferred_element_type=jnp.int32).astype(jnp.float32)


def _float_product(codes, weight_codes):
    """The same where eight-bit products are slow; exact up to 2^17 inputs."""
    return product(codes.astype(jnp.float32), weight_codes.astype(jnp.float32))
