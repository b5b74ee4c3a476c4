"""Attention whose softmax is kept in a sliding window and replaced by a memory behind it.

One layer with many settings, for the projections of a pretrained transformer: Hedgehog (Zhang et
al., 2024), SUPRA (Mercat et al., 2024), LoLCATs (Zhang et al., 2024), Liger (Lan et al., 2025) and
Lizard (Nguyen et al., 2025) are some of them.
"""

import math
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.layers import attention_heads, feature_memory
from seqlab.layers.attention_heads import AttentionHeads
from seqlab.layers.feature_memory import FeatureMemory
from seqlab.layers.linear import heads, merge
from seqlab.layers.ring import Ring
from seqlab.layers.rope import positions
from seqlab.layers.softmax_window import largest_score, with_logits
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config(attention_heads.Config):
    """In the window a query sees itself, the window - 1 tokens before it and the first `sinks` of
    its document, turned by their positions with `window_rope`. Window None is no window.

    sink_logits  so many learned scores, which take part in the window's softmax without a value
    overlap      whether the memory holds the tokens in the window too, or those behind it alone
    mix          "fixed": y = window_share y_w + (1 - window_share) y_m
                 "alpha": y = y_m + alpha y_w, alpha learned
                 "joint": the weights of both are divided by the sum of both, those of the window
                 first multiplied by a learned sigmoid(a_h) and divided by the largest of them
    """

    window: PositiveInt | None = 12
    window_rope: bool = True
    sinks: NonNegativeInt = 0
    sink_logits: NonNegativeInt = 0
    overlap: bool = True
    mix: Literal["fixed", "alpha", "joint"] = "fixed"
    window_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    memory: feature_memory.Config = feature_memory.Config()

    def __post_init__(self):
        super().__post_init__()
        if self.window is None and (self.sinks or self.sink_logits or not self.overlap):
            raise ConfigError("hybrid_attention: sinks and overlap=False need a window.")
        if self.mix == "joint" and (self.memory.norm != "own" or self.sinks):
            raise ConfigError(
                'hybrid_attention: mix="joint" divides by sums of weights, so the memory has to '
                'have them, and no sinks beside it: set memory.norm="own" and sinks=0.'
            )
        turns = "before" if self.window_rope else "none"
        alike = self.memory.rope == turns or self.rope_base is None
        if not (self.overlap or (alike and self.memory.write == "features")):
            raise ConfigError(
                "hybrid_attention: overlap=False writes keys as they leave the window, so the "
                "memory has to write features, of keys that turn as the window's do: set "
                'memory.rope="before" with window_rope=True, or "none" with False.'
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "HybridAttention":
        return HybridAttention(self, d_model, rngs=rngs)


class State(NamedTuple):
    kept: tuple  # k and v of the window [B, G, slots, K] float32; empty without one
    memory: tuple  # see FeatureMemory.init_state
    position: jax.Array  # [B] int32, of the next token


class HybridAttention(AttentionHeads):
    """y = W_o mix(y_w, y_m) of what the heads see in the window and read from the memory:

    y_w,t = softmax(scale q_t k_s^T) v_s over the window's s;  y_m,t = S_t^T phi(q_t)
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        super().__init__(c, d_model, rngs=rngs)
        sizes = c.heads, self.kv_heads, self.head_dim
        self.memory = FeatureMemory(c.memory, d_model, *sizes, rngs=rngs)
        self.ring = Ring(c.window, c.sinks)
        mix = None if c.window is None else c.mix
        start = lambda value, *shape: jnp.full(shape, value, jnp.float32)
        self.sink = nnx.Param(start(0.0, c.sink_logits), axes=(None,)) if c.sink_logits else None
        self.alpha = nnx.Param(start(1.0), axes=()) if mix == "alpha" else None
        few = start(-math.log(9), c.heads)  # at first the window counts a tenth
        self.window_factor = nnx.Param(few, axes=("heads",)) if mix == "joint" else None

    def init_state(self, batch: int) -> State:
        sizes = batch, self.kv_heads, self.head_dim
        kept = () if self.config.window is None else self.ring.empty(*sizes)
        return State(kept, self.memory.init_state(batch), jnp.zeros(batch, jnp.int32))

    def attend(self, x, state: State, reset):
        c, position = self.config, positions(reset, state.position)
        projected, v = self.k(x), heads(self.v(x), self.kv_heads)
        q = self.normed(self.q(x), c.heads, self.q_norm)
        k = self.normed(projected, self.kv_heads, self.k_norm)
        gate = k if c.memory.decay_normed else heads(projected, self.kv_heads)
        turn = lambda a: self.turned(a, position)
        either = lambda turned: (turn(q), turn(k), v) if turned else (q, k, v)
        near, far = either(c.window_rope), either(c.memory.rope == "before")
        seen, kept, valid = None, (), None
        if c.window is not None:
            seen, kept = self._see(*near, state, position, reset)
        if not c.overlap:
            left, valid = self.ring.leaving(state.kept, near[1:], state.position, position)
            far = far[0], left[0], left[1]
        written, run = (gate, valid, turn), c.implementation
        read, memory = self.memory(x, *far, *written, reset, state.memory, implementation=run)
        y = merge(self._mixed(seen, read)).astype(x.dtype)
        return y, State(kept, memory, position[:, -1] + 1)

    def _see(self, q, k, v, state: State, position, reset):
        """((y_w, what it weighs beside the memory or None), what is kept)"""
        c, past = self.config, (state.kept, state.position, position, reset)
        options = {"scale": c.scale or self.head_dim**-0.5, "cap": c.cap}
        (y, lse), kept = self.ring.attend(
            q, k, v, *past, implementation=c.implementation, **options
        )
        if self.sink is not None:
            y, lse = with_logits(y, lse, self.sink[...])
        if self.window_factor is None:
            return (y, None), kept
        before = self.ring.before(state.kept[0], state.position)
        top = largest_score(q, k, before, position, **options)
        if self.sink is not None:
            top = jnp.maximum(top, jnp.max(self.sink[...]))
        weight = jnp.exp(jax.nn.log_sigmoid(self.window_factor[...]) + lse - top)[..., None]
        return (y, weight), kept

    def _mixed(self, seen, read):
        if seen is None:
            return self.memory.normed(read)
        y, weight = widen(seen[0]), seen[1]
        if weight is not None:
            return (weight * y + read.y) / (weight + read.total[..., None])
        far, share = self.memory.normed(read), self.config.window_share
        if self.alpha is not None:
            return far + self.alpha[...] * y
        return share * y + (1 - share) * far
