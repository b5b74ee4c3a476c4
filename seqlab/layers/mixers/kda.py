"""Kimi Delta Attention (Kimi Team, 2025): a delta rule whose memory decays by channel."""

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.precision import widen
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm, unit_length
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """Heads with keys of width `key_dim` and values of width `value_dim`; both gates pass through
    `rank` channels.

    With `lowest_decay`, log decays are lowest_decay * sigmoid(exp(A_log) (. + dt_bias)), never
    below it ("safe gate"). With `negative_eigenvalues`, beta reaches 2.
    """

    heads: PositiveInt = 4
    key_dim: PositiveInt = 16
    value_dim: PositiveInt = 16
    conv_width: NonNegativeInt = 4  # of the short convolution over q, k and v; 0 for none
    rank: PositiveInt = 16
    gate_bias: bool = False
    lowest_decay: Annotated[float, Field(lt=0, allow_inf_nan=False)] | None = None
    negative_eigenvalues: bool = False
    norm_eps: PositiveFinite = 1e-5
    dt_min: PositiveFinite = 1e-3  # at the start, dt is log-uniform between these two
    dt_max: PositiveFinite = 0.1
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "KDA":
        return KDA(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution, empty without one
    memory: jax.Array  # [B, H, K, V]


class KDA(Mixer):
    """S = diag(exp(g_t)) S_{t-1};  S_t = S + k_t (beta_t (v_t - S^T k_t))^T

    y_t = (norm(S_t^T q_t) * sigmoid(x_t W_gate)) W_out, where g = -exp(A_log) softplus(x W_decay +
    dt_bias), W_gate and W_decay are of low rank and beta = sigmoid(x W_beta); q, k and v have
    passed a short convolution and silu, and q and k are made of length 1.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        H, split = c.heads, ("embed", "heads")
        self.d_k, self.d_v = H * c.key_dim, H * c.value_dim
        d_qkv = 2 * self.d_k + self.d_v
        self.qkv = Linear(d_model, d_qkv, split, rngs=rngs)
        self.conv = ShortConv(d_qkv, c.conv_width, rngs=rngs) if c.conv_width else None
        self.beta = Linear(d_model, H, split, rngs=rngs)
        self.decay_down = Linear(d_model, c.rank, ("embed", None), rngs=rngs)
        self.decay_up = Linear(c.rank, self.d_k, (None, "heads"), rngs=rngs)
        A = jax.random.uniform(rngs.params(), (H,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(A), axes=("heads",))
        log_dt = (math.log(c.dt_min), math.log(c.dt_max))
        dt = jnp.exp(jax.random.uniform(rngs.params(), (self.d_k,), jnp.float32, *log_dt))
        dt = jnp.maximum(dt, 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=("heads",))  # softplus^-1(dt)
        self.gate_down = Linear(d_model, c.rank, ("embed", None), rngs=rngs)
        self.gate_up = Linear(c.rank, self.d_v, (None, "heads"), bias=c.gate_bias, rngs=rngs)
        self.norm = RMSNorm(c.value_dim, eps=c.norm_eps)
        self.out = Linear(self.d_v, d_model, ("heads", "embed"), rngs=rngs)

    @property
    def projections(self):
        return {"qkv": (("q", self.d_k), ("k", self.d_k), ("v", self.d_v))}

    def init_state(self, batch: int) -> State:
        c = self.config
        memory = jnp.zeros((batch, c.heads, c.key_dim, c.value_dim), jnp.float32)
        return State(self.conv.init_state(batch) if self.conv else (), memory)

    def mix(self, x, state: State, reset):
        c, qkv, conv = self.config, self.qkv(x), state.conv
        if self.conv:
            qkv, conv = self.conv(qkv, conv, reset=reset)
        qkv = jnp.split(jax.nn.silu(qkv), [self.d_k, 2 * self.d_k], -1)
        q, k, v = (heads(a, c.heads) for a in qkv)
        y, memory = delta_rule(
            unit_length(q) * c.key_dim**-0.5,
            unit_length(k),
            v,
            jax.nn.sigmoid(widen(self.beta(x))) * (1 + c.negative_eigenvalues),
            self._log_decay(x),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        gate = jax.nn.sigmoid(self.gate_up(self.gate_down(x)))
        return self.out(merge(self.norm(y)) * gate), State(conv, memory)

    def _log_decay(self, x):
        """[B, T, H, K], wide"""
        c = self.config
        dt = heads(widen(self.decay_up(self.decay_down(x))) + self.dt_bias[...], c.heads)
        A = jnp.exp(self.A_log[...])[:, None]
        if c.lowest_decay is None:
            return -A * jax.nn.softplus(dt)
        return c.lowest_decay * jax.nn.sigmoid(A * dt)
