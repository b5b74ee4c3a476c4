"""Softmax attention with grouped heads, full or in a sliding window; the state is its keys.

Vaswani et al. (2017); rotary positions, Su et al. (2021); grouped heads, Ainslie et al. (2023);
sinks (the first tokens of a document stay visible), Xiao et al. (2023); normed queries and keys,
Henry et al. (2020); the gate, Qiu et al. (2025); capped scores, Gemma Team (2024, Gemma 2).
"""

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.attention import attention
from seqlab.kernels.precision import widen
from seqlab.layers import norm as norms
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.ring import Ring
from seqlab.layers.rope import Scaling, frequencies, positions, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """kv_heads defaults to heads, head_dim to d_model / heads, scale to head_dim ** -0.5.

    With a window, a query sees itself, the window - 1 tokens before it and the first `sinks` of its
    document. With window None it sees all of its document, and `max_length` is how many tokens a
    document may have; a window needs no max_length and ignores it.

    rope_base None is no positions; `rope_fraction` of a head's channels turn. `qk_norm` norms
    queries and keys within each head, with one weight for all, or over their full width. With
    `gate`, each channel of y is multiplied by sigmoid(x W_gate). `out_norm` norms what enters W_o
    (Wang et al., 2022). Scores are bent below `cap` by a tanh if there is one.
    """

    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    window: PositiveInt | None = None
    sinks: int = 0
    max_length: PositiveInt | None = 256
    rope_base: PositiveFinite | None = 10_000.0
    rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    rope_scaling: Scaling | None = None
    qk_norm: norms.Config | None = None
    qk_norm_over: Literal["head", "width"] = "head"
    qkv_bias: bool = False
    out_bias: bool = False
    gate: bool = False
    out_norm: norms.Config | None = None
    scale: PositiveFinite | None = None
    cap: PositiveFinite | None = None
    implementation: str | None = None

    def __post_init__(self):
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
        if self.head_dim is None and d_model % self.heads:
            raise ConfigError(
                f"attention: d_model={d_model} is not divisible by heads={self.heads}; or set "
                "head_dim."
            )
        return Attention(self, d_model, rngs=rngs)


class State(NamedTuple):
    k: jax.Array  # [B, slots, G, K] float32, normed and rotated; 0 in an empty slot
    v: jax.Array  # [B, slots, G, K] float32
    position: jax.Array  # [B] int32, of the next token; it tells which token each slot holds


class Attention(Mixer):
    """y = W_o softmax(scale q k^T + mask) v.

    Full attention holds `max_length` tokens of one document. A call longer than that raises
    ModelError. A document that outgrows it raises ModelError too where its position is known (not
    inside jax.jit); inside jax.jit its outputs are NaN from the first token too many on.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.ring = Ring(c.window, c.sinks, c.max_length)
        self.max_length = self.ring.limit
        self.kv_heads = G = c.kv_heads or c.heads
        self.head_dim = K = c.head_dim or d_model // c.heads
        self.rotated = int(K * c.rope_fraction)
        if c.rope_base is not None and self.rotated % 2:
            raise ConfigError(
                f"attention: rope needs an even head_dim, not {self.rotated}; or rope_base=None."
            )
        if c.rope_base is not None:
            frequencies(self.rotated, c.rope_base, c.rope_scaling)  # refuses what does not fit
        project = lambda d: Linear(d_model, d, ("embed", "heads"), bias=c.qkv_bias, rngs=rngs)
        self.q, self.k, self.v = project(c.heads * K), project(G * K), project(G * K)
        self.gate = project(c.heads * K) if c.gate else None
        norm = lambda n: c.qk_norm and c.qk_norm.build(n * K if c.qk_norm_over == "width" else K)
        self.q_norm, self.k_norm = norm(c.heads), norm(G)
        self.out_norm = c.out_norm.build(c.heads * K) if c.out_norm else None
        self.out = Linear(c.heads * K, d_model, ("heads", "embed"), bias=c.out_bias, rngs=rngs)

    def init_state(self, batch: int) -> State:
        shape = batch, self.ring.slots, self.kv_heads, self.head_dim
        k, v = (jnp.zeros(shape, jnp.float32) for _ in "kv")  # two buffers: states are donated
        return State(k, v, jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        c, position = self.config, positions(reset, state.position)
        self.ring.refuse_overflow(position)
        q = self._turn(self.q(x), c.heads, self.q_norm, position)
        k = self._turn(self.k(x), self.kv_heads, self.k_norm, position)
        v = heads(self.v(x), self.kv_heads)
        at, held = self.ring.places(state.position, position, reset)
        y = attention(
            *(q, k, v, *at, *at),
            past=(state.k, state.v, *held),
            window=c.window,
            sinks=c.sinks,
            scale=c.scale,
            cap=c.cap,
            implementation=c.implementation,
        )
        y = merge(y)
        if self.gate is not None:
            y *= jax.nn.sigmoid(widen(self.gate(x))).astype(y.dtype)
        y = y if self.out_norm is None else self.out_norm(y)
        y = self.ring.mark_overflow(self.out(y), position)
        end = position[:, -1] + 1
        k, v = self.ring.keep((state.k, state.v), (k, v), end)
        return y, State(k, v, end)

    def _turn(self, a, n: int, norm, position):
        """Normed and rotated: [B, T, n * K] -> [B, T, n, K]"""
        if norm is not None:  # over as many channels as it has weights
            a = merge(norm(heads(a, a.shape[-1] // norm.weight.size)))
        c, a = self.config, heads(a, n)
        if c.rope_base is None:
            return a
        return rope(a, position, c.rope_base, channels=self.rotated, scaling=c.rope_scaling)
