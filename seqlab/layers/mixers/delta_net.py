"""DeltaNet (Schlag et al., 2021; Yang et al., 2024): a write replaces the value its key had."""

from typing import Literal, NamedTuple

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

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "identity": lambda x: x,
}


@dataclass(frozen=True, config=STRICT)
class Config:
    """Key and value widths are d_model times `expand_k` and `expand_v`, shared by the heads.

    With `negative_eigenvalues`, beta reaches 2 and a write may turn the memory along its key round:
    what tracking a state (parity, permutations) needs (Grazzi et al., 2024).
    """

    heads: PositiveInt = 4
    expand_k: PositiveFinite = 1.0
    expand_v: PositiveFinite = 1.0
    conv_width: NonNegativeInt = 4  # of the short convolution over q, k and v; 0 for none
    activation: Literal["silu", "relu", "elu", "identity"] = "silu"  # of q and k; "elu" is elu + 1
    qk_norm: Literal["l2", "sum"] = "l2"  # what of q and k is made 1
    beta: bool = True  # learned; otherwise 1
    negative_eigenvalues: bool = False
    gate: bool = False  # multiplies the output by silu of a projection
    norm: bool = True  # of the output, by head
    norm_eps: PositiveFinite = 1e-6
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "DeltaNet":
        for name in ("expand_k", "expand_v"):
            width = int(d_model * getattr(self, name))
            if width < 1 or width % self.heads:
                raise ConfigError(
                    f"delta_net: {name} * d_model = {width} does not divide into "
                    f"{self.heads} heads."
                )
        return DeltaNet(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution, empty without one
    memory: jax.Array  # [B, H, K, V]


class DeltaNet(Mixer):
    """S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T;  y_t = norm(S_t^T q_t) W_out

    q, k and v have passed a short convolution and an activation, q and k then a norm by head;
    beta = sigmoid(x W_beta), doubled for negative eigenvalues.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.d_k, self.d_v = int(d_model * c.expand_k), int(d_model * c.expand_v)
        d_qkv, split = 2 * self.d_k + self.d_v, ("embed", "heads")
        self.qkv = Linear(d_model, d_qkv, split, rngs=rngs)
        self.conv = ShortConv(d_qkv, c.conv_width, rngs=rngs) if c.conv_width else None
        self.beta = Linear(d_model, c.heads, split, rngs=rngs) if c.beta else None
        self.gate = Linear(d_model, self.d_v, split, rngs=rngs) if c.gate else None
        self.norm = RMSNorm(self.d_v // c.heads, eps=c.norm_eps) if c.norm else None
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
        q, k, v = (heads(a, c.heads) for a in jnp.split(qkv, [self.d_k, 2 * self.d_k], -1))
        q, k = (self._normed(ACTIVATIONS[c.activation](a)) for a in (q, k))
        beta = self._beta(x)
        y, memory = delta_rule(
            q * q.shape[-1] ** -0.5,
            k,
            jax.nn.silu(v),
            beta,
            jnp.zeros((*beta.shape, 1), beta.dtype),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = merge(self.norm(y) if self.norm else y)
        if self.gate:
            y *= jax.nn.silu(self.gate(x))
        return self.out(y), State(conv, memory)

    def _normed(self, a):
        if self.config.qk_norm == "l2":
            return unit_length(a)
        total = jnp.sum(widen(a), -1, keepdims=True)
        return (widen(a) / jnp.where(total == 0, 1, total)).astype(a.dtype)

    def _beta(self, x):
        """[B, T, H], wide"""
        if self.beta is None:
            beta = jnp.ones((*x.shape[:2], self.config.heads), widen(x).dtype)
        else:
            beta = jax.nn.sigmoid(widen(self.beta(x)))
        return beta * (1 + self.config.negative_eigenvalues)
