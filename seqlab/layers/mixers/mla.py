"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values of all heads are
made of one short vector a token, and that vector is all that the state keeps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.attention import attention
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.layers.ring import Ring, Tokens
from seqlab.layers.rope import Scaling, positions, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """A key of each head has `nope_dim` channels out of the latent vector of `kv_rank`, and
    `rope_dim` that all heads share and that alone turn with the position; rope_base None is no
    positions (Kimi Linear). Queries come from a latent vector of `q_rank`, if given. What turns are
    pairs of channels across halves, or, with `interleaved`, of neighbours.

    `bias` is that of the maps into latent vectors and of the output. scale defaults to
    (nope_dim + rope_dim) ** -0.5. A document has at most `max_length` tokens.
    """

    heads: PositiveInt = 4
    kv_rank: PositiveInt = 16
    q_rank: PositiveInt | None = None
    nope_dim: PositiveInt = 8
    rope_dim: PositiveInt = 4
    v_dim: PositiveInt = 8
    max_length: PositiveInt = 256
    rope_base: PositiveFinite | None = 10_000.0
    rope_scaling: Scaling | None = None
    interleaved: bool = False
    norm_eps: PositiveFinite = 1e-6
    bias: bool = False
    scale: PositiveFinite | None = None
    implementation: str | None = None

    def __post_init__(self):
        if self.rope_base is not None and self.rope_dim % 2:
            raise ConfigError(
                f"mla: rope needs an even rope_dim, not {self.rope_dim}; or rope_base=None."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MLA":
        return MLA(self, d_model, rngs=rngs)


class State(NamedTuple):
    latent: jax.Array  # [B, slots, kv_rank], normed; 0 in an empty slot
    shared: jax.Array  # [B, slots, rope_dim], rotated: the part of the key that heads share
    position: jax.Array  # [B] int32, of the next token


class MLA(Mixer):
    """c = norm(x W_down);  [k_h, v_h] = c W_up,h;  y = W_o softmax(scale q [k_h, shared]^T) v_h

    Of several tokens, keys and values are written out. A single token reads the latent vectors as
    they are, with W_up drawn into its query and into the output, so that decoding touches kv_rank +
    rope_dim numbers a token of the document, whatever the number of heads.

    The state holds `max_length` tokens. Longer documents end as in full attention: ModelError where
    that is known, and NaN inside jax.jit.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.ring = Ring(max_length=c.max_length)
        self.max_length = self.ring.limit
        down = lambda d: Linear(d_model, d, ("embed", None), bias=c.bias, rngs=rngs)
        up = lambda d_in, d, axis: Linear(d_in, d, (axis, "heads"), rngs=rngs)
        d_q = c.heads * (c.nope_dim + c.rope_dim)
        self.q_down = down(c.q_rank) if c.q_rank else None
        self.q_norm = RMSNorm(c.q_rank, eps=c.norm_eps) if c.q_rank else None
        self.q = up(c.q_rank, d_q, None) if c.q_rank else up(d_model, d_q, "embed")
        self.kv_down = down(c.kv_rank + c.rope_dim)
        self.kv_norm = RMSNorm(c.kv_rank, eps=c.norm_eps)
        self.kv = up(c.kv_rank, c.heads * (c.nope_dim + c.v_dim), None)  # by head: [k_h | v_h]
        self.out = Linear(c.heads * c.v_dim, d_model, ("heads", "embed"), bias=c.bias, rngs=rngs)

    def init_state(self, batch: int) -> State:
        empty = lambda d: jnp.zeros((batch, self.ring.slots, d), jnp.float32)
        c = self.config
        return State(empty(c.kv_rank), empty(c.rope_dim), jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        c, position = self.config, positions(reset, state.position)
        self.ring.refuse_overflow(position)
        read = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q, q_turning = jnp.split(heads(self.q(read), c.heads), [c.nope_dim], -1)
        latent, shared = jnp.split(self.kv_down(x), [c.kv_rank], -1)
        latent = self.kv_norm(latent)
        q_turning = self._turn(q_turning, position)
        shared = self._turn(shared[:, :, None], position)[:, :, 0]
        attend = self._attend_latent if x.shape[1] == 1 else self._attend_heads
        old = state.latent, state.shared
        at, tokens, past, kept = self.ring.take(
            old, (latent, shared), state.position, position, reset
        )
        y = self.out(merge(attend(q, q_turning, at, tokens, past)))
        return self.ring.mark_overflow(y, position), State(kept[0], kept[1], position[:, -1] + 1)

    def _turn(self, a, position):
        c = self.config
        if c.rope_base is None:
            return a
        if c.interleaved:  # the products of queries and keys do not mind another order
            a = merge(heads(a, c.rope_dim // 2).swapaxes(-1, -2))
        return rope(a, position, c.rope_base, scaling=c.rope_scaling)

    def _attend_heads(self, q, q_turning, at, tokens: Tokens, past: Tokens):
        """Tokens of latent vectors and shared parts -> y by head"""
        c = self.config

        def keys(tokens):
            latent, shared = (a.astype(q.dtype) for a in tokens.arrays)
            k, v = jnp.split(heads(self.kv(latent), c.heads), [c.nope_dim], -1)
            shared = jnp.broadcast_to(shared[:, :, None], (*k.shape[:-1], c.rope_dim))
            return jnp.concatenate([k, shared], -1), v, *tokens[1:]

        return self._attend(q, q_turning, at, keys(tokens), keys(past))

    def _attend_latent(self, q, q_turning, at, tokens: Tokens, _):
        """The same by way of (q W_k^T) c^T = q (c W_k)^T and (softmax c) W_v = softmax (c W_v)."""
        c = self.config
        k, v = jnp.split(heads(self.kv.weight[...].astype(q.dtype), c.heads), [c.nope_dim], -1)
        q = jnp.einsum("bthk,rhk->bthr", q, k)
        latent, shared = tokens.arrays
        joined = jnp.concatenate([latent, shared], -1)[:, :, None]
        y = self._attend(q, q_turning, at, (joined, latent[:, :, None], *tokens[1:]), None)
        return jnp.einsum("bthr,rhv->bthv", y, v)

    def _attend(self, q, q_turning, at, keys, past):
        c, (k, v, *k_at) = self.config, keys
        return attention(
            jnp.concatenate([q, q_turning], -1),
            *(k, v, *at, *k_at),
            past=past,
            scale=c.scale or (c.nope_dim + c.rope_dim) ** -0.5,
            implementation=c.implementation,
        )
