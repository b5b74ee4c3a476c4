"""Softmax attention with grouped heads, full or in a sliding window; the state is its keys.

Vaswani et al. (2017); sinks (the first tokens of a document stay visible), Xiao et al. (2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.layers import attention_heads
from seqlab.layers.attention_heads import AttentionHeads
from seqlab.layers.linear import heads, merge
from seqlab.layers.ring import Ring
from seqlab.layers.rope import positions
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config(attention_heads.Config):
    """With a window, a query sees itself, the window - 1 tokens before it and the first `sinks` of
    its document. With window None it sees all of its document, and `max_length` is how many tokens
    a document may have; a window needs no max_length and ignores it.
    """

    window: PositiveInt | None = None
    sinks: int = 0
    max_length: PositiveInt | None = 256

    def __post_init__(self):
        super().__post_init__()
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ConfigError(
                f"attention: sinks={self.sinks} with window={self.window}: sinks are at least 0, "
                "and more than 0 only beside a window (without one nothing is ever forgotten)."
            )
        if self.window is None and self.max_length is None:
            raise ConfigError("attention: set max_length (tokens in a document) or a window.")

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Attention":
        return Attention(self, d_model, rngs=rngs)


class State(NamedTuple):
    k: jax.Array  # [B, G, slots, K] float32, normed and rotated; 0 in an empty slot
    v: jax.Array  # [B, G, slots, K] float32
    position: jax.Array  # [B] int32, of the next token; it tells which token each slot holds


class Attention(AttentionHeads):
    """y = W_o softmax(scale q k^T + mask) v.

    Full attention holds `max_length` tokens of one document. A call longer than that raises
    ModelError. A document that outgrows it raises ModelError too where its position is known (not
    inside jax.jit); inside jax.jit its outputs are NaN from the first token too many on.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        super().__init__(c, d_model, rngs=rngs)
        self.ring = Ring(c.window, c.sinks, c.max_length)
        self.max_length = self.ring.limit

    def init_state(self, batch: int) -> State:
        return State(
            *self.ring.empty(batch, self.kv_heads, self.head_dim), jnp.zeros(batch, jnp.int32)
        )

    def attend(self, x, state: State, reset):
        c, position = self.config, positions(reset, state.position)
        self.ring.refuse_overflow(position)
        seen, kept = self.ring.attend(
            self.turned(self.normed(self.q(x), c.heads, self.q_norm), position),
            self.turned(self.normed(self.k(x), self.kv_heads, self.k_norm), position),
            heads(self.v(x), self.kv_heads),
            (state.k, state.v),
            state.position,
            position,
            reset,
            scale=c.scale,
            cap=c.cap,
            implementation=c.implementation,
        )
        return merge(seen[0]), State(*kept, position[:, -1] + 1)

    def mix(self, x, state: State, reset):
        y, left = super().mix(x, state, reset)
        return self.ring.mark_overflow(y, positions(reset, state.position)), left
