"""mLSTM as in xLSTM-7B (Beck et al., 2025): exponential gates, bent below a cap, no convolution."""

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.kernels.soft_cap import soft_cap
from seqlab.layers.exponential_memory import State, empty, exponential_memory
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import LayerNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """Key and value widths are d_model times `expand_k` and `expand_v`, shared by the heads;
    `layers` is how many there are in the model, for the initial scale of the output."""

    heads: PositiveInt = 4
    expand_k: PositiveFinite = 0.5
    expand_v: PositiveFinite = 1.0
    gate_cap: PositiveFinite | None = 15.0  # gates x become cap * tanh(x / cap)
    norm_eps: PositiveFinite = 1e-6
    eps: PositiveFinite = 1e-6  # added to the normaliser
    layers: PositiveInt = 6
    chunk_size: PositiveInt = 128
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MLSTM":
        for name in ("expand_k", "expand_v"):
            width = int(d_model * getattr(self, name))
            if width < 1 or width % self.heads:
                raise ConfigError(
                    f"mlstm: {name} * d_model = {width} does not divide into {self.heads} heads."
                )
        return MLSTM(self, d_model, rngs=rngs)


class MLSTM(Mixer):
    """y_t = (norm(h_t) * sigmoid(x_t W_o)) W_out, h_t as in `exponential_memory`, with the gates
    i = exp(x_t W_i + b_i) and f = sigmoid(x_t W_f + b_f)."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, D = config, d_model
        self.config = c
        d_k, d_v = int(D * c.expand_k), int(D * c.expand_v)
        self.K, self.V = d_k // c.heads, d_v // c.heads
        small = (2 / (5 * D)) ** 0.5
        linear = lambda d, std, bias=False: Linear(
            D, d, ("embed", "heads"), bias=bias, std=std, rngs=rngs
        )
        self.q, self.k, self.v = linear(d_k, small), linear(d_k, small), linear(d_v, small)
        self.gate = linear(d_v, 0.0)
        self.i, self.f = linear(c.heads, 0.0, True), linear(c.heads, 0.0, True)
        self.i.bias = nnx.Param(jnp.full(c.heads, -10.0), axes=("heads",))
        self.f.bias = nnx.Param(jnp.linspace(3.0, 6.0, c.heads), axes=("heads",))
        self.norm = LayerNorm(d_v, eps=c.norm_eps, groups=c.heads, bias=False)
        out_std = 2 / (c.layers * D**0.5)
        self.out = Linear(d_v, D, ("heads", "embed"), std=out_std, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return empty(batch, self.config.heads, self.K, self.V)

    def mix(self, x, state: State, reset):
        c = self.config
        capped = lambda gate: soft_cap(widen(gate), c.gate_cap)
        h, state = exponential_memory(
            heads(self.q(x), c.heads),
            heads(self.k(x), c.heads),
            heads(self.v(x), c.heads),
            capped(self.i(x)),
            jax.nn.log_sigmoid(capped(self.f(x))),
            reset,
            state,
            eps=c.eps,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        return self.out(self.norm(merge(h)) * jax.nn.sigmoid(self.gate(x))), state
