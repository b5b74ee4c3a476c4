"""Aaren (Feng et al., 2024, "Attention as an RNN"): softmax attention of a learned query.

Because the query is the same at every token, the softmax over all tokens so far is a recurrence in
a maximum, a numerator and a denominator: memory is constant, and it can be scanned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.linear_scan import linear_scan
from seqlab.kernels.maxplus_scan import stabilise
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    heads: PositiveInt = 4
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Aaren":
        if d_model % self.heads:
            raise ConfigError(f"aaren: d_model = {d_model} does not divide by {self.heads} heads.")
        return Aaren(self, d_model, rngs=rngs)


class State(NamedTuple):
    largest: jax.Array  # [B, H], the largest score so far; -inf before the first
    sums: jax.Array  # [B, H, V + 1], numerator and denominator in units of e^largest


class Aaren(Mixer):
    """y_t = (sum_{j <= t} e^{s_j} v_j / sum_{j <= t} e^{s_j}) W_out

    s_j = q . k_j / sqrt(K), k_j = x_j W_k, v_j = x_j W_v, with q a parameter of each head.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config, self.d_head = config, d_model // config.heads
        query = jax.random.normal(rngs.params(), (config.heads, self.d_head), jnp.float32)
        self.query = nnx.Param(query, axes=("heads", None))
        self.k = Linear(d_model, d_model, ("embed", "heads"), rngs=rngs)
        self.v = Linear(d_model, d_model, ("embed", "heads"), rngs=rngs)
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        H = self.config.heads
        largest = jnp.full((batch, H), -jnp.inf, jnp.float32)
        return State(largest, jnp.zeros((batch, H, self.d_head + 1), jnp.float32))

    def mix(self, x, state: State, reset):
        H = self.config.heads
        k, v = (widen(heads(project(x), H)) for project in (self.k, self.v))
        scores = jnp.einsum("bthk,hk->bth", k, self.query[...]) * self.d_head**-0.5
        gates, largest = stabilise(
            jnp.zeros_like(scores), scores, reset, state.largest, initial=-jnp.inf
        )
        ones = jnp.ones_like(v[..., :1])
        write = jnp.exp(gates.log_input)[..., None] * jnp.concatenate([v, ones], -1)
        keep = jnp.broadcast_to(jnp.exp(gates.log_decay)[..., None], write.shape)
        sums, last = linear_scan(
            keep, write, reset, state.sums, implementation=self.config.implementation
        )
        y = (sums[..., :-1] / sums[..., -1:]).astype(x.dtype)
        return self.out(merge(y)), State(largest, last)
