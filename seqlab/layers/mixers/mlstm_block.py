"""The mLSTM in the block it was published in (Beck et al., 2024): between a projection up and one
down, behind a short convolution. The block needs no ffn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.layers import exponential_memory as cell
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import HeadwiseLinear, Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import LayerNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """The inner width is `expand` * d_model, rounded up to `multiple_of`; q, k and v are mixed in
    blocks of `block` channels. `layers` is how many there are in the model, for the initial scale
    of the output."""

    heads: PositiveInt = 4
    expand: PositiveFinite = 2.0
    multiple_of: PositiveInt = 64
    conv_width: PositiveInt = 4
    block: PositiveInt = 4
    eps: PositiveFinite = 1e-6  # added to the normaliser
    norm_eps: PositiveFinite = 1e-5
    layers: PositiveInt = 6
    chunk_size: PositiveInt = 128
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MLSTMBlock":
        inner = self.inner(d_model)
        for name in ("heads", "block"):
            if inner % getattr(self, name):
                raise ConfigError(
                    f"mlstm_block: the inner width {inner} does not divide by "
                    f"{name}={getattr(self, name)}."
                )
        return MLSTMBlock(self, d_model, rngs=rngs)

    def inner(self, d_model: int) -> int:
        return -int(-d_model * self.expand // self.multiple_of) * self.multiple_of


class State(NamedTuple):
    conv: tuple  # the state of the short convolution
    cell: cell.State


class MLSTMBlock(Mixer):
    """u, z = x W_up;  c = silu(conv(u));  q, k from c, v from u, the gates from all three

    y_t = ((norm(h_t) + skip * c_t) * silu(z_t)) W_down, h_t as in `exponential_memory`.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, D, inner = config, d_model, config.inner(d_model)
        self.config, small = c, (2 / (5 * D)) ** 0.5
        self.up = Linear(D, 2 * inner, ("embed", "heads"), std=small, rngs=rngs)
        self.conv = ShortConv(inner, c.conv_width, bias=True, rngs=rngs)
        n = inner // c.block
        self.q, self.k, self.v = (
            HeadwiseLinear(n, c.block, c.block, std=small, rngs=rngs) for _ in "qkv"
        )
        gate = lambda: Linear(3 * inner, c.heads, ("heads", None), bias=True, std=0.0, rngs=rngs)
        self.i, self.f = gate(), gate()
        noise = 0.1 * jax.random.normal(rngs.params(), (c.heads,), jnp.float32)
        self.i.bias = nnx.Param(noise, axes=(None,))
        self.f.bias = nnx.Param(jnp.linspace(3.0, 6.0, c.heads), axes=(None,))
        self.norm = LayerNorm(inner, eps=c.norm_eps, groups=c.heads, offset=True, bias=False)
        self.skip = nnx.Param(jnp.ones(inner, jnp.float32), axes=("heads",))
        out_std = 2 / (c.layers * D**0.5)
        self.down = Linear(inner, D, ("heads", "embed"), std=out_std, rngs=rngs)

    def init_state(self, batch: int) -> State:
        H, inner = self.config.heads, self.skip.shape[0]
        memory = cell.empty(batch, H, inner // H, inner // H)
        return State(self.conv.init_state(batch), memory)

    def mix(self, x, state: State, reset):
        c = self.config
        u, z = jnp.split(self.up(x), 2, -1)
        seen, conv = self.conv(u, state.conv, reset=reset)
        seen = jax.nn.silu(seen)
        blocks = lambda a: heads(a, a.shape[-1] // c.block)
        q, k, v = (merge(f(blocks(a))) for f, a in ((self.q, seen), (self.k, seen), (self.v, u)))
        qkv = jnp.concatenate([q, k, v], -1)
        h, memory = cell.exponential_memory(
            heads(q, c.heads),
            heads(k, c.heads),
            heads(v, c.heads),
            widen(self.i(qkv)),
            jax.nn.log_sigmoid(widen(self.f(qkv))),
            reset,
            state.cell,
            eps=c.eps,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = self.norm(merge(h)) + self.skip[...].astype(x.dtype) * seen
        return self.down(y * jax.nn.silu(z)), State(conv, memory)
