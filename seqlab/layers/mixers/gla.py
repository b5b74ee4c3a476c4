"""Gated Linear Attention (Yang et al., 2023): a matrix memory with a learned decay per channel."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, NonNegativeInt, PositiveInt
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
    """Key and value widths are d_model times `expand_k` and `expand_v`, shared by the heads."""

    heads: PositiveInt = 4
    expand_k: PositiveFinite = 0.5
    expand_v: PositiveFinite = 1.0
    conv_width: NonNegativeInt = 4  # of the short convolution over q, k and v; 0 for none
    decay_rank: PositiveInt = 16
    decay_temperature: PositiveFinite = 16.0  # divides log-sigmoid, so that memories start out long
    log_decay_min: Annotated[float, Field(lt=0, allow_inf_nan=False)] | None = None
    gate: bool = True
    norm_eps: PositiveFinite = 1e-6
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GLA":
        for name in ("expand_k", "expand_v"):
            width = int(d_model * getattr(self, name))
            if width < 1 or width % self.heads:
                raise ConfigError(
                    f"gla: {name} * d_model = {width} does not divide into {self.heads} heads."
                )
        return GLA(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution, empty without one
    memory: jax.Array  # [B, H, K, V]


class GLA(Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T,  a_t = sigmoid(x_t W_down W_up + b)^(1/temperature)

    y_t = (norm(S_t^T q_t) * silu(x_t W_gate)) W_out
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.d_k, self.d_v = int(d_model * c.expand_k), int(d_model * c.expand_v)
        d_qkv = 2 * self.d_k + self.d_v
        self.qkv = Linear(d_model, d_qkv, ("embed", "heads"), rngs=rngs)
        self.conv = ShortConv(d_qkv, c.conv_width, rngs=rngs) if c.conv_width else None
        self.decay_down = Linear(d_model, c.decay_rank, ("embed", None), rngs=rngs)
        self.decay_up = Linear(c.decay_rank, self.d_k, (None, "heads"), bias=True, rngs=rngs)
        self.gate = Linear(d_model, self.d_v, ("embed", "heads"), rngs=rngs) if c.gate else None
        self.norm = RMSNorm(self.d_v // c.heads, eps=c.norm_eps)
        self.out = Linear(self.d_v, d_model, ("heads", "embed"), rngs=rngs)

    @property
    def projections(self):
        return {"qkv": (("q", self.d_k), ("k", self.d_k), ("v", self.d_v))}

    def init_state(self, batch: int) -> State:
        H = self.config.heads
        memory = jnp.zeros((batch, H, self.d_k // H, self.d_v // H), jnp.float32)
        return State(self.conv.init_state(batch) if self.conv else (), memory)

    def mix(self, x, state: State, reset):
        c, qkv, conv = self.config, self.qkv(x), state.conv
        if self.conv:
            qkv, conv = self.conv(qkv, conv, reset=reset)
            qkv = jax.nn.silu(qkv)
        q, k, v = (heads(a, c.heads) for a in jnp.split(qkv, [self.d_k, 2 * self.d_k], -1))
        log_decay = jax.nn.log_sigmoid(widen(self.decay_up(self.decay_down(x))))
        log_decay /= c.decay_temperature
        if c.log_decay_min is not None:
            log_decay = jnp.maximum(log_decay, c.log_decay_min)
        y, memory = decayed_outer_product(
            q * q.shape[-1] ** -0.5,
            k,
            v,
            heads(log_decay, c.heads),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = merge(self.norm(y))
        y = y if self.gate is None else y * jax.nn.silu(self.gate(x))
        return self.out(y), State(conv, memory)
