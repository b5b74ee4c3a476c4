"""Softmax attention with grouped heads, full or in a sliding window; the state is its keys.

Vaswani et al. (2017); rotary positions, Su et al. (2021); grouped heads, Ainslie et al. (2023);
sinks (the first tokens of a document stay visible), Xiao et al. (2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError, ModelError
from seqlab.kernels.attention import attention
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.layers.rope import positions, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """kv_heads defaults to heads, head_dim to d_model / heads; rope_base None is no positions.

    With a window, a query sees itself, the window - 1 tokens before it and the first `sinks` of its
    document. With window None it sees all of its document, and `max_length` is how many tokens a
    document may have; a window needs no max_length and ignores it.
    """

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    sinks: int = 0
    max_length: int | None = 256
    rope_base: PositiveFinite | None = 10_000.0
    qk_norm: bool = False
    qkv_bias: bool = False
    implementation: str | None = None

    def __post_init__(self):
        for name in ("heads", "kv_heads", "head_dim", "window", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"attention: {name} must be at least 1, not {value}.")
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ConfigError(
                f"attention: sinks={self.sinks} with window={self.window}: sinks are at least 0, "
                "and more than 0 only beside a window (without one nothing is ever forgotten)."
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(
                f"attention: heads={self.heads} is not divisible by kv_heads={self.kv_heads}."
            )
        if self.window is None and self.max_length is None:
            raise ConfigError("attention: set max_length (tokens in a document) or a window.")

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Attention":
        return Attention(self, d_model, rngs=rngs)


class State(NamedTuple):
    k: jax.Array  # [B, slots, G, K] float32, normed and rotated; 0 in an empty slot
    v: jax.Array  # [B, slots, G, K] float32
    position: jax.Array  # [B] int32, of the next token; it tells which token each slot holds


class Attention(Mixer):
    """y = W_o softmax(q k^T / sqrt(K) + mask) v.

    Full attention holds `max_length` tokens of one document. A call longer than that raises
    ModelError. A document that outgrows it raises ModelError too where its position is known (not
    inside jax.jit); inside jax.jit its outputs are NaN from the first token too many on.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.max_length = config.max_length if config.window is None else None
        self.kv_heads = G = config.kv_heads or config.heads
        self.head_dim = K = config.head_dim or _head_dim(d_model, config.heads)
        if config.rope_base is not None and K % 2:
            raise ConfigError(
                f"attention: rope needs an even head_dim, not {K}; or rope_base=None."
            )
        project = lambda d: Linear(d_model, d, ("embed", "heads"), bias=config.qkv_bias, rngs=rngs)
        self.q, self.k, self.v = project(config.heads * K), project(G * K), project(G * K)
        self.q_norm = RMSNorm(K) if config.qk_norm else None
        self.k_norm = RMSNorm(K) if config.qk_norm else None
        self.out = Linear(config.heads * K, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        fixed, ring = self._slots()
        shape = batch, fixed + ring, self.kv_heads, self.head_dim
        k, v = (jnp.zeros(shape, jnp.float32) for _ in "kv")  # two buffers: states are donated
        return State(k, v, jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        c, position = self.config, positions(reset, state.position)
        self._refuse_overflow(position)
        q = self._turn(heads(self.q(x), c.heads), self.q_norm, position)
        k = self._turn(heads(self.k(x), self.kv_heads), self.k_norm, position)
        v = heads(self.v(x), self.kv_heads)

        held = _held(state.position, *self._slots())
        document = jnp.cumsum(reset, 1, dtype=jnp.int32)  # what the state holds is document 0
        y = attention(
            q,
            jnp.concatenate([state.k.astype(k.dtype), k], 1),
            jnp.concatenate([state.v.astype(v.dtype), v], 1),
            position,
            document,
            jnp.concatenate([held, position], 1),
            jnp.concatenate([jnp.where(held < 0, -1, 0), document], 1),
            window=c.window,
            sinks=c.sinks,
            implementation=c.implementation,
        )
        y = self.out(merge(y))
        if self.max_length is not None:
            y = jnp.where((position < self.max_length)[..., None], y, jnp.nan)
        return y, self._keep(state, k, v, position[:, -1] + 1)

    def _turn(self, a, norm, position):
        a = a if norm is None else norm(a)
        base = self.config.rope_base
        return a if base is None else rope(a, position, base)

    def _slots(self) -> tuple[int, int]:
        """Slots for the first tokens of a document, and slots that the tokens after share."""
        c = self.config
        return (c.max_length or 0, 0) if c.window is None else (c.sinks, c.window)

    def _keep(self, state: State, k, v, position) -> State:
        """The state after new keys and values [B, T, G, K], of which `position` [B] is the end."""
        held = _held(position, *self._slots())  # [B, slots]
        # a token keeps its slot while it is held, so what is not new already lies where it should
        at = (k.shape[1] - (position[:, None] - held))[..., None, None]

        def update(old, new):
            new = jnp.take_along_axis(new, at.clip(0), 1, mode="clip").astype(old.dtype)
            return jnp.where(held[..., None, None] < 0, 0, jnp.where(at < 0, old, new))

        return State(update(state.k, k), update(state.v, v), position)

    def _refuse_overflow(self, position):
        if self.max_length is None:
            return
        T, traced = position.shape[1], isinstance(position, Tracer)
        length = T if traced else max(T, int(position.max()) + 1)
        if length > self.max_length:
            raise ModelError(
                f"Full attention with max_length={self.max_length} cannot hold {length} tokens: "
                "shorten the document, or give the config a larger max_length or a window."
            )


def _held(position, fixed: int, ring: int):
    """[B, fixed + ring]: the position of the token in each slot, -1 for none, before `position`.

    Token p < fixed is kept in slot p; token p >= fixed in slot fixed + (p - fixed) % ring, until
    token p + ring takes that slot.
    """
    last, slot = position[:, None] - 1, jnp.arange(fixed + ring, dtype=jnp.int32)
    held = jnp.where(slot < fixed, slot, last - (last - slot) % max(ring, 1))
    return jnp.where((held >= jnp.minimum(slot, fixed)) & (held <= last), held, -1)


def _head_dim(d_model: int, heads: int) -> int:
    if d_model % heads:
        raise ConfigError(
            f"attention: d_model={d_model} is not divisible by heads={heads}; or set head_dim."
        )
    return d_model // heads
