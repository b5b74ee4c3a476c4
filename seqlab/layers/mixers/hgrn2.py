"""HGRN2 (Qin et al., 2024): gated linear attention whose key is what its gate does not keep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """d_model / key_dim heads. This is layer `layer` of `layers`, which says how little its gates
    may keep: see `HGRN2`; layer 0 has no bound."""

    key_dim: PositiveInt = 8
    layer: NonNegativeInt = 1
    layers: PositiveInt = 2
    norm_eps: PositiveFinite = 1e-5
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"hgrn2: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "HGRN2":
        if d_model % self.key_dim:
            raise ConfigError(
                f"hgrn2: d_model={d_model} does not divide by key_dim={self.key_dim}."
            )
        return HGRN2(self, d_model, rngs=rngs)


class State(NamedTuple):
    memory: jax.Array  # [B, H, K, V]


class HGRN2(Mixer):
    """S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T,  a_t = b + (1 - b) sigmoid(x_t W_f)

    y_t = norm(S_t^T silu(x_t W_q)) W_out, normed over all heads at once. The lower bound b is
    p_1 + ... + p_layer, where p_0, p_1, ... is the softmax of `bounds` over layers: it grows with
    depth, so that deep layers remember for long. The bounds of all layers are one table, of which
    each layer has its copy.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.heads = d_model // c.key_dim
        linear = lambda *axes: Linear(d_model, d_model, axes, rngs=rngs)
        self.q, self.f, self.v = (linear("embed", "heads") for _ in range(3))
        table = jnp.zeros((c.layers, d_model), jnp.float32)
        self.bounds = nnx.Param(table, axes=(None, "heads"), decay=False) if c.layer else None
        self.norm = RMSNorm(d_model, eps=c.norm_eps)
        self.out = linear("heads", "embed")

    def init_state(self, batch: int) -> State:
        K = self.config.key_dim  # and the width of values: heads split all of d_model
        return State(jnp.zeros((batch, self.heads, K, K), jnp.float32))

    def mix(self, x, state: State, reset):
        c, split = self.config, lambda a: heads(a, self.heads)
        log_decay = self._bounded(jax.nn.log_sigmoid(widen(self.f(x))))
        q = split(jax.nn.silu(self.q(x)))
        y, memory = decayed_outer_product(
            q * q.shape[-1] ** -0.5,
            split(-jnp.expm1(log_decay)).astype(x.dtype),
            split(self.v(x)),
            split(log_decay),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        return self.out(self.norm(merge(y))), State(memory)

    def _bounded(self, log_gate):
        """log(b + (1 - b) gate)"""
        if self.bounds is None:
            return log_gate
        log_p, n = jax.nn.log_softmax(self.bounds[...], 0), self.config.layer
        bound = jax.nn.logsumexp(log_p[1 : n + 1], 0)
        rest = jax.nn.logsumexp(jnp.concatenate([log_p[:1], log_p[n + 1 :]]), 0)
        return jnp.logaddexp(bound, rest + log_gate)
