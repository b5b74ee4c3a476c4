"""The recurrent block of Griffin and RecurrentGemma (De et al., 2024), around its RG-LRU."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.linear_scan import linear_scan
from seqlab.kernels.precision import bounded_sqrt, widen
from seqlab.layers.conv import ShortConv
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`width` channels, by default d_model; their gates are block-diagonal in `heads` blocks."""

    width: PositiveInt | None = None
    heads: PositiveInt = 4
    conv_width: PositiveInt = 4
    c: PositiveFinite = 8.0  # the strongest decay is a^c
    gate_scale: PositiveFinite = 1.0  # variance of the gates' weights times the width of a block
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RGLRU":
        width = self.width or d_model
        if width % self.heads:
            raise ConfigError(f"rg_lru: width = {width} does not divide by {self.heads} heads.")
        return RGLRU(self, d_model, rngs=rngs)


class State(NamedTuple):
    conv: tuple  # the state of the short convolution
    h: jax.Array  # [B, E]
    begun: jax.Array  # [B] bool, whether the document has a token already


class RGLRU(Mixer):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * u_t);  y_t = (h_t * gelu(x_t W_gate)) W_out

    u = conv(x W_u), i = sigmoid(u W_i), r = sigmoid(u W_r), log a = -c r softplus(decay). A
    document's first token enters whole: its factor is 1, not sqrt(1 - a^2).
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.width = E = c.width or d_model
        self.gate = Linear(d_model, E, ("embed", "heads"), bias=True, rngs=rngs)
        self.u = Linear(d_model, E, ("embed", "heads"), bias=True, rngs=rngs)
        self.conv = ShortConv(E, c.conv_width, bias=True, std=0.1 * c.conv_width**-0.5, rngs=rngs)
        block = (c.heads, E // c.heads, E // c.heads)
        std = (c.gate_scale / block[-1]) ** 0.5
        weight = lambda: std * jax.random.normal(rngs.params(), block, jnp.float32)
        bias = lambda: jnp.zeros(block[:2], jnp.float32)
        axes = ("heads", None, None)
        self.input = nnx.Param(weight(), axes=axes)
        self.input_bias = nnx.Param(bias(), axes=axes[:2], decay=False)
        self.recurrent = nnx.Param(weight(), axes=axes)
        self.recurrent_bias = nnx.Param(bias(), axes=axes[:2], decay=False)
        a = jax.random.uniform(rngs.params(), (E,), jnp.float32, 0.9**2, 0.999**2) ** 0.5
        self.decay = nnx.Param(jnp.log(1 / a - 1), axes=("heads",))  # softplus(decay) = -log a
        self.out = Linear(E, d_model, ("heads", "embed"), bias=True, rngs=rngs)

    def init_state(self, batch: int) -> State:
        h = jnp.zeros((batch, self.width), jnp.float32)
        return State(self.conv.init_state(batch), h, jnp.zeros(batch, bool))

    def mix(self, x, state: State, reset):
        c = self.config
        u, conv = self.conv(self.u(x), state.conv, reset=reset)
        i = self._gate(u, self.input, self.input_bias)
        r = self._gate(u, self.recurrent, self.recurrent_bias)
        log_a = -c.c * r * jax.nn.softplus(self.decay[...])
        first = reset.at[:, 0].set(reset[:, 0] | ~state.begun)[..., None]
        factor = jnp.where(first, 1.0, bounded_sqrt(-jnp.expm1(2 * log_a)))
        h, last = linear_scan(
            jnp.exp(log_a), factor * i * widen(u), reset, state.h, implementation=c.implementation
        )
        y = h.astype(x.dtype) * jax.nn.gelu(self.gate(x), approximate=True)
        return self.out(y), State(conv, last, jnp.ones_like(state.begun))

    def _gate(self, u, weight, bias):
        """sigmoid of a block-diagonal map [B, T, E], in float32."""
        blocks = heads(u, self.config.heads)
        gate = jnp.einsum("bthi,hij->bthj", blocks, weight[...].astype(u.dtype))
        return jax.nn.sigmoid(merge(widen(gate) + bias[...]))
