"""RWKV-7 "Goose" (Peng et al., 2025): a memory that decays and is edited by channels."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.diagonal_plus_low_rank import diagonal_plus_low_rank
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Bottleneck, Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import LayerNorm
from seqlab.layers.token_shift import previous
from seqlab.settings import STRICT, PositiveFinite

SEEN = "rwkvag"  # what sees its own mixture of a token and the one before


@dataclass(frozen=True, config=STRICT)
class Config:
    """The first layer (`first`) shares its values with all later ones, which mix them in. This is
    layer `layer` of `layers`, which says where weights start. A rank None is the published one."""

    heads: PositiveInt = 4
    first: bool = True
    layer: NonNegativeInt = 0
    layers: PositiveInt = 1
    decay_rank: PositiveInt | None = None
    rate_rank: PositiveInt | None = None
    value_rank: PositiveInt | None = None
    gate_rank: PositiveInt | None = None
    norm_eps: PositiveFinite = 64e-5
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"rwkv7: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV7":
        if d_model % self.heads:
            raise ConfigError(
                f"rwkv7: d_model = {d_model} does not divide into {self.heads} heads."
            )
        return RWKV7(self, d_model, rngs=rngs)


class State(NamedTuple):
    previous: jax.Array  # [B, D], the last token
    memory: jax.Array  # [B, H, K, V]


class RWKV7(Mixer):
    """S_t = diag(exp(w_t)) S_{t-1} - (a_t * c_t) (S_{t-1}^T c_t)^T + k_t v_t^T

    y_t = ((norm(S_t^T r_t) + (r_t . (k_t u)) v_t) * g_t) W_out, where w = -e^-0.5 sigmoid(.), c is
    k * removal made of length 1, and a is in (0, 1). Each of r, w, k, v, a, g sees a mixture of x_t
    and x_{t-1} of its own; w, a, g and how much v takes of the first layer's pass bottlenecks.
    """

    shares = True
    projections = {"r": (("q", None),)}

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, D, N = config, d_model, d_model // config.heads
        self.config = c
        n, rho, r = jnp.arange(D, dtype=jnp.float32), 1 - c.layer / c.layers, _depth(c)
        place = n / max(D - 1, 1)
        within = 2 * (n % N) / max(N - 1, 1) - 1
        zigzag, line = within * jnp.abs(within), place - 0.5
        power = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * rho  # of SEEN
        self.mu = nnx.Param(1 - (n / D) ** power, axes=(None, None), decay=False)
        start = -5.5 + 6 * place ** (1 + r**0.3) + 2.5 * zigzag
        self.decay = Bottleneck(D, c.decay_rank or _rank(2.5, D), start, rngs=rngs)
        start = -0.19 + 0.3 * zigzag + 0.4 * line
        self.rate = Bottleneck(D, c.rate_rank or _rank(2.5, D), start, rngs=rngs)
        rank, start = c.value_rank or _rank(1.7, D), 0.73 - 0.4 * line
        self.value = None if c.first else Bottleneck(D, rank, start, rngs=rngs)
        self.gate = Bottleneck(D, c.gate_rank or _rank(5.0, D), None, rngs=rngs)
        linear = lambda std: Linear(D, D, ("embed", "heads"), std=std * (3 * D) ** -0.5, rngs=rngs)
        self.r, self.k, self.v = linear(0.5), linear(0.05), linear(0.5)
        self.removal = nnx.Param(0.71 - 0.1 * line, axes=("heads",))
        self.replacement = nnx.Param(jnp.full(D, 1.02), axes=("heads",))
        self.bonus = nnx.Param(jnp.full((c.heads, N), -0.04), axes=("heads", None), decay=False)
        self.norm = LayerNorm(D, eps=c.norm_eps, groups=c.heads)
        start = jnp.full(D, ((c.layer + 1) / c.layers) ** 0.7)
        self.norm.weight = nnx.Param(start, axes=(None,))
        self.out = Linear(D, D, ("heads", "embed"), std=0.0, rngs=rngs)

    def init_state(self, batch: int) -> State:
        H, N = self.bonus.shape
        memory = jnp.zeros((batch, H, N, N), jnp.float32)
        return State(jnp.zeros((batch, H * N), jnp.float32), memory)

    def mix(self, x, state: State, reset, shared):
        c = self.config
        before, last = previous(x, state.previous, reset)
        mu = self.mu[...].astype(x.dtype)[:, None, None]
        see = dict(zip(SEEN, x + (before - x) * mu, strict=True))
        r, k, v = self.r(see["r"]), self.k(see["k"]), self.v(see["v"])
        if c.first or shared is None:
            shared = v
        if self.value is not None:
            v += (shared - v) * jax.nn.sigmoid(self.value(see["v"]))
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(widen(self.decay(see["w"], jnp.tanh)))
        rate = jax.nn.sigmoid(widen(self.rate(see["a"])))
        removed = _unit(heads(widen(k) * self.removal[...], c.heads))
        k = heads(widen(k) * (1 + (rate - 1) * self.replacement[...]), c.heads)
        r, v, rate, narrow = heads(r, c.heads), heads(v, c.heads), heads(rate, c.heads), x.dtype
        y, memory = diagonal_plus_low_rank(
            r,
            k.astype(narrow),
            v,
            -removed.astype(narrow),
            (removed * rate).astype(narrow),
            heads(log_decay, c.heads),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        bonus = jnp.sum(widen(r) * k * self.bonus[...], -1, keepdims=True).astype(narrow)
        y = self.norm(merge(y)) + merge(bonus * v)
        y *= self.gate(see["g"], jax.nn.sigmoid)
        return self.out(y), State(last, memory), shared


def _depth(c: Config) -> float:
    return c.layer / max(c.layers - 1, 1)


def _rank(factor: float, d: int) -> int:
    return max(32, 32 * round(factor * d**0.5 / 32))


def _unit(a):
    """a / max(|a|, 1e-12), along the last axis"""
    return a * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(a), -1, keepdims=True), 1e-24))
