"""RWKV-6 "Finch" (Peng et al., 2024): a memory that decays by channels and is read before it is
written, with a bonus for the token itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import read_before_write
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import LayerNorm
from seqlab.layers.token_shift import previous
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """Key and value widths are d_model times `expand_k` and `expand_v`, shared by the heads; this
    is layer `layer` of `layers`, which says where the mixing weights start."""

    heads: PositiveInt = 4
    expand_k: PositiveFinite = 1.0
    expand_v: PositiveFinite = 1.0
    mix_rank: PositiveInt = 32
    decay_rank: PositiveInt = 64
    norm_eps: PositiveFinite = 64e-5
    layer: NonNegativeInt = 0
    layers: PositiveInt = 1
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"rwkv6: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV6":
        for name in ("expand_k", "expand_v"):
            width = int(d_model * getattr(self, name))
            if width < 1 or width % self.heads:
                raise ConfigError(
                    f"rwkv6: {name} * d_model = {width} does not divide into {self.heads} heads."
                )
        return RWKV6(self, d_model, rngs=rngs)


class State(NamedTuple):
    previous: jax.Array  # [B, D], the last token
    memory: jax.Array  # [B, H, K, V]


class RWKV6(Mixer):
    """y_t = (norm((S_{t-1} + diag(u) k_t v_t^T)^T r_t) * silu(g_t)) W_out

    S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T. Each of r, w, k, v, g sees x_t mixed with
    x_{t-1}, by weights that depend on the two (rank `mix_rank`); w passes a bottleneck, too.
    """

    projections = {"r": (("q", None),)}

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, D = config, d_model
        self.config = c
        d_k, d_v = int(D * c.expand_k), int(D * c.expand_v)
        deep, shallow = c.layer / max(c.layers - 1, 1), 1 - c.layer / c.layers
        channel = jnp.arange(D, dtype=jnp.float32) / D
        mu = 1 - channel**shallow
        half = 1 - channel ** (0.5 * shallow)
        uniform = lambda *shape: jax.random.uniform(rngs.params(), shape, jnp.float32, -0.01, 0.01)
        linear = lambda d, **more: Linear(D, d, ("embed", "heads"), rngs=rngs, **more)
        self.mu = nnx.Param(mu, axes=(None,))
        self.mix_down = Linear(D, 5 * c.mix_rank, ("embed", None), std=0.0, rngs=rngs)
        self.mix_up = nnx.Param(uniform(5, c.mix_rank, D), axes=(None, None, "embed"))
        bias = jnp.stack([half, mu, mu, mu - 0.3 * deep, half])  # of r, w, k, v, g
        self.mix_bias = nnx.Param(bias, axes=(None, None), decay=False)
        self.r, self.k, self.v, self.gate = linear(d_k), linear(d_k), linear(d_v), linear(d_v)
        self.decay_down = Linear(D, c.decay_rank, ("embed", None), std=0.0, rngs=rngs)
        self.decay_up = nnx.Param(uniform(c.decay_rank, d_k), axes=(None, "heads"))
        n = jnp.arange(d_k, dtype=jnp.float32)
        place = n / max(d_k - 1, 1)
        self.decay_bias = nnx.Param(-6 + 5 * place ** (0.7 + 1.3 * deep), axes=("heads",))
        bonus = deep * (1 - place) + 0.1 * ((n + 1) % 3 - 1)
        bonus = bonus.reshape(c.heads, -1)
        self.bonus = nnx.Param(bonus, axes=("heads", None), decay=False)
        self.norm = LayerNorm(d_v, eps=c.norm_eps, groups=c.heads)
        self.out = Linear(d_v, D, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        H, K = self.bonus.shape
        memory = jnp.zeros((batch, H, K, self.out.weight.shape[0] // H), jnp.float32)
        return State(jnp.zeros((batch, self.mu.shape[0]), jnp.float32), memory)

    def mix(self, x, state: State, reset):
        c, as_x = self.config, lambda a: a[...].astype(x.dtype)
        before, last = previous(x, state.previous, reset)
        delta = before - x
        low = heads(jnp.tanh(self.mix_down(x + delta * as_x(self.mu))), 5)  # [B, T, 5, rank]
        weights = jnp.einsum("btnr,nrd->nbtd", low, as_x(self.mix_up))
        r, w, k, v, g = x + delta * (weights + as_x(self.mix_bias)[:, None, None])
        w = widen(jnp.tanh(self.decay_down(w)) @ as_x(self.decay_up)) + self.decay_bias[...]
        y, memory = read_before_write(
            heads(self.r(r), c.heads),
            heads(self.k(k), c.heads),
            heads(self.v(v), c.heads),
            heads(-jnp.exp(w), c.heads),
            self.bonus[...],
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = self.norm(merge(y)) * jax.nn.silu(self.gate(g))
        return self.out(y), State(last, memory)
