"""Mixture-of-Memories (Du et al., 2025): several memories, of which each token uses a few."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.experts import apart
from seqlab.kernels.precision import widen
from seqlab.kernels.routed import Memories, Routed, routed
from seqlab.layers import auxiliary
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear, heads, merge, product
from seqlab.layers.memories import KINDS, Base, matrices
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, NonNegativeFinite, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`memories` of the kind `base` (see `layers.memories`), `top_k` of which a token uses, and
    with `shared_memory` one more for all tokens.

    Each memory has keys, values and gates of its own, unless `single_kv_proj`; queries are those of
    all memories if `share_q`. The short convolution, of `conv_width` or 0 for none, is over the
    tokens of each memory, or with `conv_scope` "sequence" over x before it reaches any of them.
    The load-balance loss is multiplied by `aux_scale`. `implementation` is one of `kernels.experts`
    for the projections.
    """

    memories: PositiveInt = 4
    top_k: PositiveInt = 2
    base: Base = "gated_delta"
    shared_memory: bool = True
    single_kv_proj: bool = False
    share_q: bool = True
    heads: PositiveInt = 2
    key_dim: PositiveInt = 16
    value_dim: PositiveInt = 16
    conv_width: NonNegativeInt = 4
    conv_scope: Literal["memory", "sequence"] = "memory"
    gate: bool = True  # multiplies the output, after its norm, by silu of a projection
    norm_eps: PositiveFinite = 1e-6
    aux_scale: NonNegativeFinite = 0.01
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.top_k > self.memories:
            raise ConfigError(
                f"mom: top_k={self.top_k} is more than the {self.memories} memories there are."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MoM":
        return MoM(self, d_model, rngs=rngs)


class MoM(Mixer):
    """s_t = softmax(x_t W_router);  I_t = the top k of it;  w_t = s_t / sum of s_t over I_t

    y_t = (norm(sum_{m in I_t} w_tm S^m_t q_t + S^shared_t q_t) * silu(x_t W_gate)) W_out, where
    token t is written to the memories in I_t, and to the shared one, and to no other. The router
    and its weights are float32, and weigh what is read, never what is written.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.d_k, self.d_v, split = c.heads * c.key_dim, c.heads * c.value_dim, ("embed", "heads")
        self.count = c.memories + c.shared_memory
        each = 1 if c.single_kv_proj else self.count
        self.router = Linear(d_model, c.memories, ("embed", None), rngs=rngs)
        stack = functools.partial(matrices, each, d_model, axes=split, rngs=rngs)
        self.q: Any = Linear(d_model, self.d_k, split, rngs=rngs) if c.share_q else stack(self.d_k)
        self.k, self.v = stack(self.d_k), stack(self.d_v)
        shape = c.heads, c.key_dim, c.value_dim
        self.base = KINDS[c.base](each, d_model, shape, rngs)
        convolved = 2 * self.d_k + self.d_v if c.conv_scope == "memory" else d_model
        self.conv = ShortConv(convolved, c.conv_width, rngs=rngs) if c.conv_width else None
        self.gate = Linear(d_model, self.d_v, split, rngs=rngs) if c.gate else None
        self.norm = RMSNorm(c.value_dim, eps=c.norm_eps)
        self.out = Linear(self.d_v, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> Memories:
        c, conv = self.config, ()
        if self.conv and c.conv_scope == "sequence":
            conv = self.conv.init_state(batch)
        elif self.conv:
            width = 2 * c.key_dim + c.value_dim
            shape = batch, c.heads, self.count, c.conv_width - 1, width
            conv = jnp.zeros(shape, jnp.float32)
        shape = batch, c.heads, self.count, c.key_dim, c.value_dim
        return Memories(conv, jnp.zeros(shape, jnp.float32))

    def mix(self, x, state: Memories, reset):
        c, conv, u, taps = self.config, state.conv, x, None
        if self.conv and c.conv_scope == "sequence":
            u, conv = self.conv(x, conv, reset=reset)
            state = state._replace(conv=())
        elif self.conv:
            taps = jnp.moveaxis(self._by_head(self.conv.weight[...]), 0, 1)
        chosen, share = self._choose(x)
        weights = tuple(w[...] for w in self.base.weights)
        tokens = self._projected(u, chosen, share)
        y, state = routed(self.base, tokens, reset, taps, weights, state, chunk_size=c.chunk_size)
        y = merge(self.norm(y))
        y = y if self.gate is None else y * jax.nn.silu(self.gate(x))
        return self.out(y), state if taps is not None else state._replace(conv=conv)

    def _choose(self, x) -> tuple[jax.Array, jax.Array]:
        """The memories of each token [B, T, k], and the weights of their reads."""
        c = self.config
        scores = jax.nn.softmax(self.router(widen(x)))
        share, chosen = jax.lax.top_k(scores, c.top_k)
        auxiliary.load_balance(scores, chosen, c.aux_scale)
        share /= jnp.sum(share, -1, keepdims=True)
        if c.shared_memory:
            more = lambda a, value: jnp.pad(a, [(0, 0)] * 2 + [(0, 1)], constant_values=value)
            chosen, share = more(chosen, c.memories), more(share, 1)
        return chosen, share

    def _projected(self, x, chosen, share) -> Routed:
        """What tokens x [B, T, D] bring to the memories they chose."""
        c = self.config
        own = (self.k, self.v) if c.share_q else (self.q, self.k, self.v)

        def project(multiply, weights, x):
            gates = self.base.gates(multiply, x, *weights[len(own) :])
            parts = [heads(multiply(x, w), c.heads) for w in weights[: len(own)]]
            return merge(jnp.concatenate(parts if gates is None else [*parts, gates], -1))

        weights = tuple(w[...].astype(x.dtype) for w in (*own, *self.base.projections))
        if c.single_kv_proj:
            y = project(lambda x, w: product(x, w[0]), weights, x)[:, :, None]
        else:
            y = apart(project, weights, x, chosen, implementation=c.implementation)
        y = jnp.moveaxis(heads(y, c.heads), 2, 3)  # [B, T, H, k, ...]
        q = heads(self.q(x), c.heads)[:, :, :, None] if c.share_q else y[..., :0]
        y, gates = jnp.split(y, [2 * c.key_dim + c.value_dim - q.shape[-1]], -1)
        return Routed(q, y, gates, chosen[:, :, None], share[:, :, None])

    def _by_head(self, a: jax.Array) -> jax.Array:
        """[..., q, k, v of all heads] -> [..., H, q, k, v of one]"""
        parts = jnp.split(a, [self.d_k, 2 * self.d_k], -1)
        return jnp.concatenate([heads(part, self.config.heads) for part in parts], -1)
