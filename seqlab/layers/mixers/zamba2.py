"""The hybrid layer of Zamba2 (Glorioso et al., 2024): a transformer block that reads the model's
embeddings beside the stream, and a mixer that reads the stream and what that block makes of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.layers.ffn import ACTIVATIONS, Activation
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.layers.registry import MixerConfig
from seqlab.layers.ring import Ring
from seqlab.layers.rope import Scaling, positions, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """Attention of `heads` over 2 * d_model channels, and a gated perceptron of inner width
    `width`; `inner` None leaves the layer at what these return.

    The block's weights are meant to be the same at several depths: `rank` is that of the maps that
    adapt them to each, of the perceptron and, with `adapt_attention`, of queries, keys and values.
    Attention holds `max_length` tokens.
    """

    inner: MixerConfig | None = None
    heads: PositiveInt = 4
    width: PositiveInt = 64
    activation: Activation = "gelu"
    rank: PositiveInt | None = 4
    adapt_attention: bool = True
    bias: bool = False
    max_length: PositiveInt = 256
    rope_base: PositiveFinite | None = 10_000.0
    rope_scaling: Scaling | None = None
    norm_eps: PositiveFinite = 1e-5
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Zamba2":
        unit = self.heads if self.rope_base is None else 2 * self.heads
        if 2 * d_model % unit:
            raise ConfigError(
                f"zamba2: 2 * d_model = {2 * d_model} does not divide by {unit}: change heads."
            )
        return Zamba2(self, d_model, rngs=rngs)


class State(NamedTuple):
    k: jax.Array  # [B, H, slots, K], rotated
    v: jax.Array  # [B, H, slots, K]
    position: jax.Array  # [B] int32, of the next token
    mixer: Any  # the state of the mixer, () without one


class Adapted(nnx.Module):
    """x -> x W + (x A) B, where A and B adapt a W that several layers share."""

    def __init__(self, d_in, d_out, axes, rank: int | None, *, bias: bool = False, rngs: nnx.Rngs):
        self.base = Linear(d_in, d_out, axes, bias=bias, rngs=rngs)
        self.down = Linear(d_in, rank, (axes[0], None), rngs=rngs) if rank else None
        self.up = Linear(rank, d_out, (None, axes[1]), rngs=rngs) if rank else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.base(x)
        return y if self.down is None or self.up is None else y + self.up(self.down(x))


class Zamba2(Mixer):
    """t = W ffn(norm(attention(norm([x, embedding]))));  y = mixer(norm(x + t))

    It norms what it reads by itself, so its block must not (`Join(place="none")`). Where it stands
    alone, x stands for the embedding. Queries are scaled by (K / 2)^-0.5.
    """

    shares = True

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, d = config, d_model
        self.config, self.ring = c, Ring(max_length=c.max_length)
        project = lambda: Adapted(
            2 * d, 2 * d, ("embed", "heads"), c.rank if c.adapt_attention else None, rngs=rngs
        )
        self.norm = RMSNorm(2 * d, eps=c.norm_eps)
        self.q, self.k, self.v = project(), project(), project()
        self.out = Linear(2 * d, d, ("heads", "embed"), rngs=rngs)
        self.ffn_norm = RMSNorm(d, eps=c.norm_eps)
        self.gate_up = Adapted(d, 2 * c.width, ("embed", "ffn"), c.rank, bias=c.bias, rngs=rngs)
        self.down = Linear(c.width, d, ("ffn", "embed"), bias=c.bias, rngs=rngs)
        self.linear = Linear(d, d, ("embed", None), rngs=rngs)
        self.mixer_norm = RMSNorm(d, eps=c.norm_eps) if c.inner else None
        self.mixer = c.inner.build(d, rngs=rngs) if c.inner else None
        self.head_dim = 2 * d // c.heads
        self.max_length = min(c.max_length, getattr(self.mixer, "max_length", None) or c.max_length)
        self.prefix = getattr(self.mixer, "prefix", 0)

    def init_state(self, batch: int) -> State:
        k, v = self.ring.empty(batch, self.config.heads, self.head_dim)
        inner = self.mixer.init_state(batch) if self.mixer else ()
        return State(k, v, jnp.zeros(batch, jnp.int32), inner)

    def mix(self, x, state: State, reset, shared):
        both = jnp.concatenate([x, x if shared is None else shared], -1)
        y, k, v, position = self._attend(self.norm(both), state, reset)
        t = self.linear(self._perceptron(self.ffn_norm(y)))
        if self.mixer is None or self.mixer_norm is None:
            return t, State(k, v, position, ()), shared
        y, inner = self.mixer(self.mixer_norm(x + t), state.mixer, reset=reset)
        return y, State(k, v, position, inner), shared

    def _attend(self, x, state: State, reset):
        """[B, T, 2 D] -> [B, T, D], and keys, values and position of the state after."""
        c, position = self.config, positions(reset, state.position)
        self.ring.refuse_overflow(position)
        q, k, v = (heads(project(x), c.heads) for project in (self.q, self.k, self.v))
        if c.rope_base is not None:
            q, k = (rope(a, position, c.rope_base, scaling=c.rope_scaling) for a in (q, k))
        past = (state.k, state.v), state.position, position, reset
        options = {"scale": (self.head_dim / 2) ** -0.5, "implementation": c.implementation}
        (y, _), kept = self.ring.attend(q, k, v, *past, **options)
        y = self.ring.mark_overflow(self.out(merge(y)), position)
        return y, *kept, position[:, -1] + 1

    def _perceptron(self, x):
        gate, up = jnp.split(self.gate_up(x), 2, -1)
        return self.down(ACTIVATIONS[self.config.activation](gate) * up)
