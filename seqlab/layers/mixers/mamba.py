"""Mamba (Gu & Dao, 2023): a selective state space with N states a channel."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.kernels.selective_scan import selective_scan
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`width` channels, by default `expand` * d_model, of `d_state` states each."""

    d_state: PositiveInt = 16
    expand: PositiveFinite = 2.0
    width: PositiveInt | None = None
    conv_width: PositiveInt = 4
    conv_bias: bool = True
    bias: bool = False  # of the projections in and out
    dt_rank: PositiveInt | None = None  # None is d_model / 16, rounded up
    dt_min: PositiveFinite = 1e-3  # at the start, dt is log-uniform between these two
    dt_max: PositiveFinite = 0.1
    norm: Literal["none", "plain", "weighted"] = "none"  # of dt, b, c: FalconMamba plain, Jamba
    norm_eps: PositiveFinite = 1e-6
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Mamba":
        if self.inner(d_model) < 1:
            raise ConfigError(f"mamba: expand = {self.expand} leaves no channel: make it larger.")
        return Mamba(self, d_model, rngs=rngs)

    def inner(self, d_model: int) -> int:
        return self.width or int(self.expand * d_model)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution
    memory: jax.Array  # [B, E, N]


class Mamba(Mixer):
    """h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) b_t^T;  y_t = h_t c_t + D u_t

    out = (y * silu(x W_z)) W_out, where u = silu(conv(x W_u)), [r, b, c] = u W_select,
    dt = softplus(r W_dt + dt_bias) and A = -exp(A_log).
    """

    projections = {"u": (("v", None),)}

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.inner = E = c.inner(d_model)
        self.rank = R = c.dt_rank or math.ceil(d_model / 16)
        self.u = Linear(d_model, E, ("embed", "heads"), bias=c.bias, rngs=rngs)
        self.z = Linear(d_model, E, ("embed", "heads"), bias=c.bias, rngs=rngs)
        self.conv = ShortConv(E, c.conv_width, bias=c.conv_bias, rngs=rngs)
        self.select = Linear(E, R + 2 * c.d_state, ("heads", None), rngs=rngs)
        normed = (R, c.d_state, c.d_state) if c.norm != "none" else ()
        weight = c.norm == "weighted"
        self.norms = nnx.List([RMSNorm(n, eps=c.norm_eps, weight=weight) for n in normed])
        self.dt = Linear(R, E, (None, "heads"), rngs=rngs)
        uniform = jax.random.uniform(rngs.params(), (R, E), jnp.float32, -1, 1)
        self.dt.weight = nnx.Param(uniform * R**-0.5, axes=(None, "heads"))
        log_dt = (math.log(c.dt_min), math.log(c.dt_max))
        dt = jnp.exp(jax.random.uniform(rngs.params(), (E,), jnp.float32, *log_dt))
        dt = jnp.maximum(dt, 1e-4)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=("heads",))  # softplus^-1(dt)
        A = jnp.broadcast_to(jnp.arange(1, c.d_state + 1, dtype=jnp.float32), (E, c.d_state))
        self.A_log = nnx.Param(jnp.log(A), axes=("heads", None), decay=False)
        self.D = nnx.Param(jnp.ones(E, jnp.float32), axes=("heads",))
        self.out = Linear(E, d_model, ("heads", "embed"), bias=c.bias, rngs=rngs)

    def init_state(self, batch: int) -> State:
        memory = jnp.zeros((batch, self.inner, self.config.d_state), jnp.float32)
        return State(self.conv.init_state(batch), memory)

    def mix(self, x, state: State, reset):
        c = self.config
        u, conv = self.conv(self.u(x), state.conv, reset=reset)
        u = jax.nn.silu(u)
        selected = jnp.split(self.select(u), [self.rank, self.rank + c.d_state], -1)
        if self.norms:
            selected = [norm(s) for norm, s in zip(self.norms, selected, strict=True)]
        r, b, q = selected
        dt = jax.nn.softplus(widen(self.dt(r)) + self.dt_bias[...])
        y, memory = selective_scan(
            u,
            dt,
            b[:, :, None],
            q[:, :, None],
            reset,
            -jnp.exp(self.A_log[...]),
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y += self.D[...].astype(u.dtype) * u
        return self.out(y * jax.nn.silu(self.z(x))), State(conv, memory)
