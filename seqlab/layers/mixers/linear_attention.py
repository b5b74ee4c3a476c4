"""Linear attention (Katharopoulos et al., 2020): a sum of k v^T, read under any feature map."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.precision import widen
from seqlab.layers import feature_maps
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """kv_heads defaults to heads; key and value widths are d_model times `expand_k`, `expand_v`.

    `normaliser` divides by the sum of scores, as the paper does. Without it, `norm_eps` says how
    the output of each head is normed instead; both may be absent.
    """

    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    expand_k: PositiveFinite = 1.0
    expand_v: PositiveFinite = 1.0
    feature_map: feature_maps.Config = feature_maps.Config()
    tie_feature_map: bool = False  # one map for queries and keys
    sum_q: bool = False  # divide the features of a query by their sum
    sum_k: bool = False
    scale: bool = False  # multiply queries by (number of features) ** -0.5
    normaliser: bool = True
    eps: PositiveFinite = 1e-6  # added to the normaliser
    norm_eps: PositiveFinite | None = None
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(
                f"linear_attention: heads={self.heads} is not divisible by "
                f"kv_heads={self.kv_heads}."
            )
        if self.normaliser and self.feature_map.kind in feature_maps.SIGNED:
            raise ConfigError(
                f"linear_attention: scores under the feature map {self.feature_map.kind!r} may sum "
                "to zero: set normaliser=False, or take a positive map."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "LinearAttention":
        for name in ("expand_k", "expand_v"):
            width = int(d_model * getattr(self, name))
            if width < 1 or width % self.heads:
                raise ConfigError(
                    f"linear_attention: {name} * d_model = {width} does not divide into "
                    f"{self.heads} heads."
                )
        return LinearAttention(self, d_model, rngs=rngs)


class State(NamedTuple):
    memory: jax.Array  # [B, H, F, V], with a normaliser [B, H, F, V + 1]


class LinearAttention(Mixer):
    """S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t)

    y_t = W_out S_t^T phi(q_t) / (z_t . phi(q_t) + eps)
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        K, V = (int(d_model * e) // c.heads for e in (c.expand_k, c.expand_v))
        self.V, self.kv_heads = V, c.kv_heads or c.heads
        linear = lambda d: Linear(d_model, d, ("embed", "heads"), rngs=rngs)
        self.q, self.k, self.v = (
            linear(c.heads * K),
            linear(self.kv_heads * K),
            linear(self.kv_heads * V),
        )
        self.map_q = c.feature_map.build(K, c.heads, rngs=rngs)
        self.map_k = None if c.tie_feature_map else c.feature_map.build(K, c.heads, rngs=rngs)
        self.norm = RMSNorm(V, eps=c.norm_eps) if c.norm_eps else None
        self.out = Linear(c.heads * V, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        shape = batch, self.config.heads, self.map_q.width, self.V + self.config.normaliser
        return State(jnp.zeros(shape, jnp.float32))

    def mix(self, x, state: State, reset):
        c = self.config
        every = lambda a: jnp.repeat(heads(a, self.kv_heads), c.heads // self.kv_heads, 2)
        q = self.map_q(heads(self.q(x), c.heads))
        k = (self.map_k or self.map_q)(every(self.k(x)))
        q, k = (_divided(q) if c.sum_q else q), (_divided(k) if c.sum_k else k)
        y, memory = decayed_outer_product(
            q * q.shape[-1] ** -0.5 if c.scale else q,
            k,
            every(self.v(x)),
            jnp.zeros((*q.shape[:3], 1), widen(q).dtype),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            normaliser=c.normaliser,
            implementation=c.implementation,
        )
        if c.normaliser:
            y, total = y
            y = (y / (total + c.eps)[..., None]).astype(x.dtype)
        y = y if self.norm is None else self.norm(y)
        return self.out(merge(y)), State(memory)


def _divided(features: jax.Array) -> jax.Array:
    """Features divided by their sum."""
    wide = widen(features)
    return (wide / (jnp.sum(wide, -1, keepdims=True) + 1e-4)).astype(features.dtype)
