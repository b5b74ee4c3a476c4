"""RetNet (Sun et al., 2023): multi-scale retention, each head forgetting at its own fixed rate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.precision import widen
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.layers.rope import positions, rope
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """Key and value widths are d_model times `expand_k` and `expand_v`, shared by the heads."""

    heads: PositiveInt = 4
    expand_k: PositiveFinite = 1.0
    expand_v: PositiveFinite = 2.0
    rope_base: PositiveFinite | None = (
        10_000.0  # of the rotation of queries and keys; None for none
    )
    conv_width: NonNegativeInt = 0  # of a short convolution over q, k and v; 0 for none
    gate: bool = True
    norm_eps: PositiveFinite = 1e-6
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RetNet":
        for name in ("expand_k", "expand_v"):
            width = int(d_model * getattr(self, name))
            if width < 1 or width % self.heads:
                raise ConfigError(
                    f"retnet: {name} * d_model = {width} does not divide into {self.heads} heads."
                )
        if self.rope_base is not None and int(d_model * self.expand_k) // self.heads % 2:
            raise ConfigError("retnet: rope needs an even key width in a head, or rope_base=None.")
        return RetNet(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution, empty without one
    memory: jax.Array  # [B, H, K, V]
    position: jax.Array  # [B] int32, of the next token in its document


class RetNet(Mixer):
    """S_t = gamma S_{t-1} + k_t v_t^T,  gamma = 1 - 2^(-5 - h) for head h;  q and k are rotated

    y_t = (norm(S_t^T q_t) * silu(x_t W_gate)) W_out. The norm of each head undoes whatever scale
    a row of scores has, so the paper's three normalisations of scores are left out.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.d_k, self.d_v = int(d_model * c.expand_k), int(d_model * c.expand_v)
        # Xavier with gain 2^-2.5, as the authors' code has it
        linear = lambda d: Linear(
            d_model, d, ("embed", "heads"), std=0.25 * (d_model + d) ** -0.5, rngs=rngs
        )
        self.qkv = linear(2 * self.d_k + self.d_v)
        d_qkv = 2 * self.d_k + self.d_v
        self.conv = ShortConv(d_qkv, c.conv_width, rngs=rngs) if c.conv_width else None
        self.gate = linear(self.d_v) if c.gate else None
        self.norm = RMSNorm(self.d_v // c.heads, eps=c.norm_eps)
        self.out = Linear(self.d_v, d_model, ("heads", "embed"), rngs=rngs)

    @property
    def projections(self):
        return {"qkv": (("q", self.d_k), ("k", self.d_k), ("v", self.d_v))}

    def init_state(self, batch: int) -> State:
        H = self.config.heads
        memory = jnp.zeros((batch, H, self.d_k // H, self.d_v // H), jnp.float32)
        conv = self.conv.init_state(batch) if self.conv else ()
        return State(conv, memory, jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        c, qkv, conv = self.config, self.qkv(x), state.conv
        if self.conv:
            qkv, conv = self.conv(qkv, conv, reset=reset)
            qkv = jax.nn.silu(qkv)
        q, k, v = (heads(a, c.heads) for a in jnp.split(qkv, [self.d_k, 2 * self.d_k], -1))
        position = positions(reset, state.position)
        if c.rope_base is not None:
            q, k = rope(q, position, c.rope_base), rope(k, position, c.rope_base)
        log_gamma = np.log1p(-(2.0 ** (-5 - np.arange(c.heads))))
        y, memory = decayed_outer_product(
            q * q.shape[-1] ** -0.5,
            k,
            v,
            jnp.broadcast_to(log_gamma[:, None], (*v.shape[:3], 1)).astype(widen(x).dtype),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = merge(self.norm(y))
        y = y if self.gate is None else y * jax.nn.silu(self.gate(x))
        return self.out(y), State(conv, memory, position[:, -1] + 1)
