"""Kinds of matrix memory that a mixture holds several of: the gates of a write, and its recurrence.

    gated_delta   S = e^g S;  S = S + k (beta (v - S^T k))^T      (Yang, Kautz & Hatamizadeh, 2024)
    gated_linear  S = diag(e^g) S + k v^T, g = log sigmoid(x W_down W_up + b) / 16
                                                                  (Yang et al., 2023)
    ssd           S = e^(dt A) S + dt k v^T                       (Dao & Gu, 2024)
    linear        S = S + k v^T                                   (Katharopoulos et al., 2020)

where g = -exp(A_log) softplus(x W_dt + dt_bias) in the first, dt the same softplus and
A = -exp(A_log) in the third. Gates are projected for each memory, A_log and dt_bias are of all.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.decayed_outer_product.xla import OuterProduct
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.delta_rule.xla import DeltaRule
from seqlab.kernels.precision import widen
from seqlab.layers.norm import unit_length

Base = Literal["gated_delta", "gated_linear", "ssd", "linear"]

DECAY_RANK, DECAY_TEMPERATURE = 16, 16.0


class Kind(nnx.Module):
    """`count` memories [H, K, V] = shape, or one for all, of tokens of width d_model."""

    recurrence: Callable  # `kernels.recurrence`
    chunk: Any  # one chunk of its chunked form

    def __init__(self, count: int, d_model: int, shape: tuple[int, int, int], rngs: nnx.Rngs):
        self.shape = shape

    @property
    def projections(self) -> tuple:
        """Matrices [count, d_in, d_out], of each memory."""
        return ()

    @property
    def weights(self) -> tuple:
        """Arrays [H, ...], of all memories."""
        return ()

    def gates(self, multiply: Callable, x: jax.Array, *projections) -> jax.Array | None:
        """x [..., D] -> [..., H, g], where multiply(x, w) stands for x @ w."""
        return None

    def tokens(self, qkv: jax.Array, gates: jax.Array | None, *weights) -> tuple:
        """What the recurrence takes before `reset`, from qkv [B, S, H, 2 K + V] and gates
        [B, S, H, g]."""
        K = self.shape[1]
        return self.write(*jnp.split(jax.nn.silu(qkv), [K, 2 * K], -1), gates, *weights)

    def write(self, q, k, v, gates, *weights) -> tuple:
        """The same, from q, k and v."""
        return q * q.shape[-1] ** -0.5, k, v, jnp.zeros_like(widen(q[..., :1]))


class Linear(Kind):
    recurrence, chunk = decayed_outer_product, OuterProduct()


class GatedLinear(Kind):
    recurrence, chunk = decayed_outer_product, OuterProduct()

    def __init__(self, count, d_model, shape, rngs):
        self.shape, d_k = shape, shape[0] * shape[1]
        self.decay_down = matrices(count, d_model, DECAY_RANK, ("embed", None), rngs)
        self.decay_up = matrices(count, DECAY_RANK, d_k, (None, "heads"), rngs)
        bias = jnp.zeros((count, 1, d_k), jnp.float32)
        self.decay_bias = nnx.Param(bias, axes=(None, None, "heads"), decay=False)

    @property
    def projections(self):
        return self.decay_down, self.decay_up, self.decay_bias

    def gates(self, multiply, x, down, up, bias):
        decay = multiply(multiply(x, down), up) + multiply(jnp.ones_like(x[..., :1]), bias)
        return decay.reshape(*decay.shape[:-1], *self.shape[:2])

    def write(self, q, k, v, gates):
        log_decay = jax.nn.log_sigmoid(widen(gates)) / DECAY_TEMPERATURE
        return q * q.shape[-1] ** -0.5, k, v, log_decay


class SSD(Kind):
    recurrence, chunk = decayed_outer_product, OuterProduct()

    def __init__(self, count, d_model, shape, rngs):
        self.shape = shape
        self.dt = matrices(count, d_model, shape[0], ("embed", "heads"), rngs)
        self.A_log, self.dt_bias = _decay(shape[0], rngs)

    @property
    def projections(self):
        return (self.dt,)

    @property
    def weights(self):
        return self.A_log, self.dt_bias

    def gates(self, multiply, x, dt):
        return multiply(x, dt)[..., None]

    def write(self, q, k, v, gates, A_log, dt_bias):
        dt = jax.nn.softplus(widen(gates) + dt_bias[:, None])  # [B, S, H, 1]
        return q, k, (v * dt).astype(v.dtype), -jnp.exp(A_log)[:, None] * dt


class GatedDelta(SSD):
    recurrence, chunk = delta_rule, DeltaRule

    def __init__(self, count, d_model, shape, rngs):
        super().__init__(count, d_model, shape, rngs)
        self.beta = matrices(count, d_model, shape[0], ("embed", "heads"), rngs)

    @property
    def projections(self):
        return self.beta, self.dt

    def gates(self, multiply, x, beta, dt):
        return jnp.stack([multiply(x, beta), multiply(x, dt)], -1)

    def write(self, q, k, v, gates, A_log, dt_bias):
        beta, dt = jnp.moveaxis(widen(gates), -1, 0)
        q, k = unit_length(q), unit_length(k)
        log_decay = -jnp.exp(A_log) * jax.nn.softplus(dt + dt_bias)
        return q * q.shape[-1] ** -0.5, k, v, jax.nn.sigmoid(beta), log_decay[..., None]


KINDS = {"gated_delta": GatedDelta, "gated_linear": GatedLinear, "ssd": SSD, "linear": Linear}


def matrices(count: int, d_in: int, d_out: int, axes: tuple, rngs: nnx.Rngs) -> nnx.Param:
    """The matrices [count, d_in, d_out] of all memories, each as `linear.Linear` starts its own."""
    weight = jax.random.normal(rngs.params(), (count, d_in, d_out), jnp.float32)
    return nnx.Param(weight * d_in**-0.5, axes=(None, *axes))


def _decay(heads: int, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
    """A_log and dt_bias as Mamba-2 starts them: A uniform up to 16, dt log-uniform in 1e-3, 0.1."""
    A = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 0.01, 16.0)
    log_dt = jax.random.uniform(rngs.params(), (heads,), jnp.float32, math.log(1e-3), math.log(0.1))
    dt = jnp.exp(log_dt)
    bias = dt + jnp.log(-jnp.expm1(-dt))  # softplus^-1(dt)
    return nnx.Param(jnp.log(A), axes=("heads",)), nnx.Param(bias, axes=("heads",))
