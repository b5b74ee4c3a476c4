"""Mamba-2 (Dao & Gu, 2024): a selective state space whose state decays by one scalar a head."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.precision import widen
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`heads` of `head_dim` channels, or else of `expand` * d_model channels together; B and C are
    shared within `groups` of heads.

    `norm` says how the output meets its gate: normed after it, before it, or not at all. `gains`
    multiply z, x, B, C and dt as they are projected (muP; Falcon-H1).
    """

    head_dim: PositiveInt = 16
    heads: PositiveInt | None = None
    d_state: PositiveInt = 16
    groups: PositiveInt = 1
    expand: PositiveFinite = 2.0
    conv_width: PositiveInt = 4
    conv_bias: bool = True
    bias: bool = False
    out_bias: bool = False
    dt_min: PositiveFinite = 1e-3  # at the start, dt is log-uniform between these two
    dt_max: PositiveFinite = 0.1
    dt_limit: tuple[float, float | None] = (0.0, None)  # dt is clipped to this range at all times
    norm: Literal["after_gate", "before_gate"] | None = "after_gate"
    norm_eps: PositiveFinite = 1e-5
    gains: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Mamba2":
        inner = self.inner(d_model)
        if inner < 1 or inner % self.head_dim:
            raise ConfigError(
                f"mamba2: expand * d_model = {inner} does not divide by head_dim = {self.head_dim}."
            )
        if inner // self.head_dim % self.groups:
            raise ConfigError(
                f"mamba2: {inner // self.head_dim} heads do not divide into {self.groups} groups."
            )
        return Mamba2(self, d_model, rngs=rngs)

    def inner(self, d_model: int) -> int:
        return self.heads * self.head_dim if self.heads else int(self.expand * d_model)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution over x, B and C
    memory: jax.Array  # [B, H, N, P]


class Mamba2(Mixer):
    """S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T;  y_t = S_t^T C_t + D x_t

    out = norm(y * silu(z)) W_out, where x, B and C have passed a short convolution and silu, and
    dt = softplus(. + dt_bias), A = -exp(A_log). The mean square of the norm is taken by group.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.inner = c.inner(d_model)
        self.heads = H = self.inner // c.head_dim
        project = lambda d: Linear(d_model, d, ("embed", "heads"), bias=c.bias, rngs=rngs)
        xbc = self.inner + 2 * c.groups * c.d_state
        self.z, self.xbc, self.dt = project(self.inner), project(xbc), project(H)
        self.conv = ShortConv(xbc, c.conv_width, bias=c.conv_bias, rngs=rngs)
        log_dt = (math.log(c.dt_min), math.log(c.dt_max))
        dt = jnp.exp(jax.random.uniform(rngs.params(), (H,), jnp.float32, *log_dt))
        dt = jnp.maximum(dt, 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=("heads",))  # softplus^-1(dt)
        A = jax.random.uniform(rngs.params(), (H,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(A), axes=("heads",))
        self.D = nnx.Param(jnp.ones(H, jnp.float32), axes=("heads",))
        self.norm = RMSNorm(self.inner, eps=c.norm_eps, groups=c.groups) if c.norm else None
        self.out = Linear(self.inner, d_model, ("heads", "embed"), bias=c.out_bias, rngs=rngs)

    @property
    def projections(self):
        shared = self.config.groups * self.config.d_state
        return {"xbc": (("v", self.inner), ("k", shared), ("q", shared))}

    def init_state(self, batch: int) -> State:
        c = self.config
        memory = jnp.zeros((batch, self.heads, c.d_state, c.head_dim), jnp.float32)
        return State(self.conv.init_state(batch), memory)

    def mix(self, x, state: State, reset):
        c = self.config
        z, xbc, dt = self._project(x)
        xbc, conv = self.conv(xbc, state.conv, reset=reset)
        u, b, q = jnp.split(jax.nn.silu(xbc), self._cuts, -1)
        u = heads(u, self.heads)
        dt = jax.nn.softplus(widen(dt) + self.dt_bias[...])  # [B, T, H]
        dt = jnp.clip(dt, *c.dt_limit)
        y, memory = decayed_outer_product(
            heads(q, c.groups),
            heads(b, c.groups),
            (u * dt[..., None]).astype(u.dtype),
            (-jnp.exp(self.A_log[...]) * dt)[..., None],
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = merge(y + (self.D[...][:, None] * u).astype(u.dtype))
        return self.out(self._gated(y, jax.nn.silu(z))), State(conv, memory)

    @property
    def _cuts(self) -> list[int]:
        """Where x, B and C part."""
        return [self.inner, self.inner + self.config.groups * self.config.d_state]

    def _project(self, x):
        z, xbc, dt = self.z(x), self.xbc(x), self.dt(x)
        of_z, of_x, of_b, of_c, of_dt = gains = self.config.gains
        if set(gains) == {1.0}:
            return z, xbc, dt
        parts = zip(jnp.split(xbc, self._cuts, -1), (of_x, of_b, of_c), strict=True)
        return z * of_z, jnp.concatenate([part * gain for part, gain in parts], -1), dt * of_dt

    def _gated(self, y, gate):
        if self.norm is None:
            return y * gate
        before = self.config.norm == "before_gate"
        return self.norm(y) * gate if before else self.norm(y * gate)
