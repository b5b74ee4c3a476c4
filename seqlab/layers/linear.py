"""Linear maps: float32 weights used in the dtype of the input, with named axes for sharding."""

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.parallel.mesh import SEQ


class Linear(nnx.Module):
    """x [..., d_in] -> x W + b [..., d_out], in the dtype of x.

    `axes` names the two dimensions of the weight (see `parallel.mesh.RULES`). The weight starts
    normal with standard deviation `std`, by default d_in ** -0.5 (LeCun); the bias at zero.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        weight = jax.random.normal(rngs.params(), (d_in, d_out), jnp.float32)
        weight *= d_in**-0.5 if std is None else std
        self.weight = nnx.Param(weight, axes=axes)
        self.bias = nnx.Param(jnp.zeros(d_out, jnp.float32), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class HeadwiseLinear(nnx.Module):
    """x [..., H, d_in] -> x_h W_h + b_h [..., H, d_out], a map of its own for every head.

    The weight [H, d_in, d_out] starts normal with standard deviation `std`, by default
    d_in ** -0.5; the bias at zero.
    """

    def __init__(
        self,
        n: int,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        weight = jax.random.normal(rngs.params(), (n, d_in, d_out), jnp.float32)
        weight *= d_in**-0.5 if std is None else std
        self.weight = nnx.Param(weight, axes=("heads", None, None))
        zeros = jnp.zeros((n, d_out), jnp.float32)
        self.bias = nnx.Param(zeros, axes=("heads", None), decay=False) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum("...hd,hde->...he", x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Bottleneck(nnx.Module):
    """x [..., D] -> act(x W_down) W_up + bias [..., D], through `rank` channels, as in RWKV-7.

    W_down starts at zero, so at first there is the bias alone, and W_up orthogonal.
    """

    def __init__(self, d: int, rank: int, bias: jax.Array | None, *, rngs: nnx.Rngs):
        self.down = Linear(d, rank, ("embed", None), std=0.0, rngs=rngs)
        up = jax.nn.initializers.orthogonal(0.1)(rngs.params(), (rank, d), jnp.float32)
        self.up = nnx.Param(up, axes=(None, "heads"))
        self.bias = None if bias is None else nnx.Param(bias, axes=("heads",))

    def __call__(self, x: jax.Array, activation=lambda h: h) -> jax.Array:
        y = activation(self.down(x)) @ self.up[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def product(x: jax.Array, weight: jax.Array, **options) -> jax.Array:
    """x [..., d_in] times weight [d_in, d_out]; options are those of `jnp.matmul`.

    All tokens are rows of one matrix, whose gradients XLA forms 1.5 times as fast on a CPU as those
    of a batch of matrices. Only where a mesh splits time they are left as they lie: to make one row
    of two split axes XLA would gather them.
    """
    if x.ndim < 3 or jax.sharding.get_abstract_mesh().shape.get(SEQ, 1) > 1:
        return jnp.matmul(x, weight, **options)
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), weight, **options)
    return y.reshape(*x.shape[:-1], weight.shape[-1])


def heads(x: jax.Array, n: int) -> jax.Array:
    """[B, T, n * d] -> [B, T, n, d]"""
    return x.reshape(*x.shape[:-1], n, -1)


def merge(x: jax.Array) -> jax.Array:
    """[B, T, n, d] -> [B, T, n * d]"""
    return x.reshape(*x.shape[:-2], -1)
