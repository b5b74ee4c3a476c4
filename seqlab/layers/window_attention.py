"""Softmax attention in a sliding window, beside learned tokens that every query sees: the
persistent memory of Titans (Behrouz, Zhong & Mirrokni, 2024, section 3.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import dot, widen
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.ring import Ring
from seqlab.layers.rope import positions, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """A query sees itself, the window - 1 tokens before it, and `persistent` learned tokens, which
    stand nowhere: neither they nor the queries that they meet are turned by rotary positions."""

    heads: PositiveInt = 4
    window: PositiveInt = 12
    persistent: NonNegativeInt = 4
    rope_base: PositiveFinite | None = 10_000.0
    implementation: str | None = None


class State(NamedTuple):
    k: jax.Array  # [B, window, H, K] float32, rotated; 0 in an empty slot
    v: jax.Array  # [B, window, H, K] float32
    position: jax.Array  # [B] int32, of the next token


class WindowAttention(nnx.Module):
    """x, y [B, T, D]; y are the heads' answers side by side."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        if d_model % c.heads or (c.rope_base is not None and d_model // c.heads % 2):
            raise ConfigError(
                f"Window attention: d_model={d_model} does not divide into heads={c.heads} of even "
                "width."
            )
        self.ring = Ring(c.window)
        self.q, self.k, self.v = (
            Linear(d_model, d_model, ("embed", "heads"), rngs=rngs) for _ in "qkv"
        )
        self.persistent = Persistent(c.persistent, d_model, rngs=rngs)

    def init_state(self, batch: int) -> State:
        d_model = self.q.weight.shape[1]
        kept = self.ring.empty(batch, self.config.heads, d_model // self.config.heads)
        return State(*kept, jnp.zeros(batch, jnp.int32))

    def __call__(self, x, state: State, reset) -> tuple[jax.Array, State]:
        c, position = self.config, positions(reset, state.position)
        q, k, v = (heads(project(x), c.heads) for project in (self.q, self.k, self.v))
        turned = lambda a: a if c.rope_base is None else rope(a, position, c.rope_base)
        past = (state.k, state.v), state.position, position, reset
        run = c.implementation
        seen, kept = self.ring.attend(turned(q), turned(k), v, *past, implementation=run)
        y = merge(self.persistent(*seen, q, self.k, self.v))
        return y, State(*kept, position[:, -1] + 1)


class Persistent(nnx.Module):
    """n learned tokens [n, D], of the size of normed ones, that all queries see."""

    def __init__(self, n: int, d_model: int, *, rngs: nnx.Rngs):
        tokens = jax.random.normal(rngs.params(), (n, d_model), jnp.float32)
        self.tokens = nnx.Param(tokens, axes=(None, None)) if n else None

    def __call__(self, y, lse, q, k: Linear, v: Linear) -> jax.Array:
        """What queries [B, T, H, K] are answered that were answered y [B, T, H, K], of log-sum-exp
        [B, T, H], before they saw these tokens' keys and values too, in the same softmax."""
        if self.tokens is None:
            return y
        keys, values = (heads(f(self.tokens[...].astype(q.dtype)), q.shape[2]) for f in (k, v))
        scores = dot("bthk,nhk->bthn", q, keys) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.concatenate([lse[..., None], scores], -1), -1)
        y = weights[..., :1] * widen(y) + dot("bthn,nhk->bthk", weights[..., 1:], widen(values))
        return y.astype(q.dtype)
