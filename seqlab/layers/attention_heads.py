"""The weights that every attention over grouped heads has, whatever its heads do between them.

Vaswani et al. (2017); rotary positions, Su et al. (2021); grouped heads, Ainslie et al. (2023);
normed queries and keys, Henry et al. (2020); the gate, Qiu et al. (2025);
capped scores, Gemma Team (2024, Gemma 2).
"""

import abc
from typing import Annotated, Any, Literal

import jax
from flax import nnx
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.layers import norm as norms
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.rope import Scaling, frequencies, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """kv_heads defaults to heads, head_dim to d_model / heads, scale to head_dim ** -0.5.

    rope_base None is no positions; `rope_fraction` of a head's channels turn. `qk_norm` norms
    queries and keys within each head, with one weight for all, or over their full width. With
    `gate`, each channel of y is multiplied by sigmoid(x W_gate). `out_norm` norms what enters W_o
    (Wang et al., 2022). Scores are bent below `cap` by a tanh if there is one.
    """

    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
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
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(
                f"attention: heads={self.heads} is not divisible by kv_heads={self.kv_heads}."
            )

    def width(self, d_model: int) -> int:
        """Channels of a head; raises ConfigError where they cannot be what this config says."""
        if self.head_dim is None and d_model % self.heads:
            raise ConfigError(
                f"attention: d_model={d_model} is not divisible by heads={self.heads}; or set "
                "head_dim."
            )
        width = self.head_dim or d_model // self.heads
        turned = int(width * self.rope_fraction)
        if self.rope_base is not None and turned % 2:
            raise ConfigError(
                f"attention: rope needs an even head_dim, not {turned}; or rope_base=None."
            )
        if self.rope_base is not None:
            frequencies(turned, self.rope_base, self.rope_scaling)  # refuses what does not fit
        return width


class AttentionHeads(Mixer):
    """y = W_o norm(attend(x) * sigmoid(x W_gate)), the norm and the gate if there are any.

    A mixer of this kind defines `config`, `init_state` and `attend`.
    """

    config: Any

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = config
        self.kv_heads = G = c.kv_heads or c.heads
        self.head_dim = K = c.width(d_model)
        self.rotated = int(K * c.rope_fraction)
        project = lambda d: Linear(d_model, d, ("embed", "heads"), bias=c.qkv_bias, rngs=rngs)
        self.q, self.k, self.v = project(c.heads * K), project(G * K), project(G * K)
        self.gate = project(c.heads * K) if c.gate else None
        norm = lambda n: c.qk_norm and c.qk_norm.build(n * K if c.qk_norm_over == "width" else K)
        self.q_norm, self.k_norm = norm(c.heads), norm(G)
        self.out_norm = c.out_norm.build(c.heads * K) if c.out_norm else None
        self.out = Linear(c.heads * K, d_model, ("heads", "embed"), bias=c.out_bias, rngs=rngs)

    @abc.abstractmethod
    def attend(self, x: jax.Array, state: Any, reset: jax.Array) -> tuple[jax.Array, Any]:
        """x [B, T, D], state, reset [B, T] -> what the heads say, side by side, [B, T, H * K] in
        the dtype of x, and the state after it."""

    def leave(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """What becomes of `attend`'s y [B, T, H * K]: gated, normed, and projected [B, T, D]."""
        if self.gate is not None:
            y *= jax.nn.sigmoid(widen(self.gate(x))).astype(y.dtype)
        return self.out(y if self.out_norm is None else self.out_norm(y))

    def mix(self, x, state, reset):
        y, state = self.attend(x, state, reset)
        return self.leave(x, y), state

    def normed(self, a: jax.Array, n: int, norm) -> jax.Array:
        """Queries or keys [B, T, n * K] -> [B, T, n, K]"""
        if norm is not None:  # over as many channels as it has weights
            a = merge(norm(heads(a, a.shape[-1] // norm.weight.size)))
        return heads(a, n)

    def turned(self, a: jax.Array, position: jax.Array) -> jax.Array:
        """[B, T, n, K], position [B, T] -> the same, rotated if this attention has positions."""
        c = self.config
        if c.rope_base is None:
            return a
        return rope(a, position, c.rope_base, channels=self.rotated, scaling=c.rope_scaling)
