"""Gated DeltaNet (Yang, Kautz & Hatamizadeh, 2024): a memory that forgets and replaces."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.precision import widen
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm, unit_length
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`key_heads` of width `key_dim`, each shared by value_heads / key_heads heads of `value_dim`.

    With `negative_eigenvalues`, beta reaches 2 (Grazzi et al., 2024).
    """

    key_heads: PositiveInt = 2
    value_heads: PositiveInt = 4
    key_dim: PositiveInt = 16
    value_dim: PositiveInt = 16
    conv_width: NonNegativeInt = 4  # of the short convolution over q, k and v; 0 for none
    gate: bool = True  # multiplies the output, after its norm, by silu of a projection
    negative_eigenvalues: bool = False
    norm_eps: PositiveFinite = 1e-6
    dt_min: PositiveFinite = 1e-3  # at the start, dt is log-uniform between these two
    dt_max: PositiveFinite = 0.1
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.value_heads % self.key_heads:
            raise ConfigError(
                f"gated_delta_net: {self.value_heads} value heads do not divide into "
                f"{self.key_heads} key heads."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedDeltaNet":
        return GatedDeltaNet(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution, empty without one
    memory: jax.Array  # [B, H, K, V]


class GatedDeltaNet(Mixer):
    """S = exp(g_t) S_{t-1};  S_t = S + k_t (beta_t (v_t - S^T k_t))^T

    y_t = (norm(S_t^T q_t) * silu(x_t W_gate)) W_out, where g = -exp(A_log) softplus(x W_dt +
    dt_bias) and beta = sigmoid(x W_beta); q, k and v have passed a short convolution and silu, and
    q and k are made of length 1.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        H, split = c.value_heads, ("embed", "heads")
        self.d_k, self.d_v = c.key_heads * c.key_dim, H * c.value_dim
        d_qkv = 2 * self.d_k + self.d_v
        self.qkv = Linear(d_model, d_qkv, split, rngs=rngs)
        self.conv = ShortConv(d_qkv, c.conv_width, rngs=rngs) if c.conv_width else None
        self.beta = Linear(d_model, H, split, rngs=rngs)
        self.dt = Linear(d_model, H, split, rngs=rngs)
        A = jax.random.uniform(rngs.params(), (H,), jnp.float32, 0.01, 16.0)
        self.A_log = nnx.Param(jnp.log(A), axes=("heads",))
        log_dt = (math.log(c.dt_min), math.log(c.dt_max))
        dt = jnp.exp(jax.random.uniform(rngs.params(), (H,), jnp.float32, *log_dt))
        dt = jnp.maximum(dt, 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=("heads",))  # softplus^-1(dt)
        self.gate = Linear(d_model, self.d_v, split, rngs=rngs) if c.gate else None
        self.norm = RMSNorm(c.value_dim, eps=c.norm_eps)
        self.out = Linear(self.d_v, d_model, ("heads", "embed"), rngs=rngs)

    @property
    def projections(self):
        return {"qkv": (("q", self.d_k), ("k", self.d_k), ("v", self.d_v))}

    def init_state(self, batch: int) -> State:
        c = self.config
        memory = jnp.zeros((batch, c.value_heads, c.key_dim, c.value_dim), jnp.float32)
        return State(self.conv.init_state(batch) if self.conv else (), memory)

    def mix(self, x, state: State, reset):
        c, qkv, conv = self.config, self.qkv(x), state.conv
        if self.conv:
            qkv, conv = self.conv(qkv, conv, reset=reset)
        q, k, v = jnp.split(jax.nn.silu(qkv), [self.d_k, 2 * self.d_k], -1)
        q, k = (unit_length(heads(a, c.key_heads)) for a in (q, k))
        beta = jax.nn.sigmoid(widen(self.beta(x))) * (1 + c.negative_eigenvalues)
        dt = jax.nn.softplus(widen(self.dt(x)) + self.dt_bias[...])  # [B, T, H]
        y, memory = delta_rule(
            q * c.key_dim**-0.5,
            k,
            heads(v, c.value_heads),
            beta,
            (-jnp.exp(self.A_log[...]) * dt)[..., None],
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = merge(self.norm(y))
        if self.gate:
            y *= jax.nn.silu(self.gate(x))
        return self.out(y), State(conv, memory)
