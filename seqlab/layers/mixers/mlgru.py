"""MLGRU (Zhu et al., 2024, "Scalable MatMul-free Language Modeling"): a GRU without products
between what it remembers and its weights."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.linear_scan import linear_scan
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """This is layer `layer` of `layers`, which says how little its gates may forget; layer 0 has no
    bound. `output` is what follows the memory: see `MLGRU`."""

    output: Literal["checkpoint", "paper"] = "checkpoint"
    layer: NonNegativeInt = 1
    layers: PositiveInt = 2
    norm_eps: PositiveFinite = 1e-6
    implementation: str | None = None

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"mlgru: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MLGRU":
        return MLGRU(self, d_model, rngs=rngs)


class State(NamedTuple):
    h: jax.Array  # [B, D]


class MLGRU(Mixer):
    """h_t = f_t h_{t-1} + (1 - f_t) silu(x_t W_c),  f_t = b + (1 - b) sigmoid(x_t W_f)

    y_t = (norm(x_t W_g) silu(h_t)) W_o as the published models compute, for which output is
    "checkpoint"; (sigmoid(x_t W_g) h_t) W_o as their paper has it, "paper". All products are
    elementwise but those with weights, and these need none in a model with linear = "bit".

    The lower bound b is p_1 + ... + p_layer, where p_0, p_1, ... is the softmax of `bounds` over
    layers (HGRN, Qin et al., 2023). The bounds of all layers are one table, of which each layer has
    its copy.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.d_model = d_model
        self.forget, self.candidate, self.gate = (
            _linear(d_model, ("embed", "heads"), rngs) for _ in range(3)
        )
        table = jnp.zeros((c.layers, d_model), jnp.float32)
        self.bounds = nnx.Param(table, axes=(None, "heads"), decay=False) if c.layer else None
        self.norm = RMSNorm(d_model, eps=c.norm_eps) if c.output == "checkpoint" else None
        self.out = _linear(d_model, ("heads", "embed"), rngs)

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.d_model), jnp.float32))

    def mix(self, x, state: State, reset):
        logits, bound, rest = widen(self.forget(x)), *self._bound()
        keep = bound + rest * jax.nn.sigmoid(logits)
        write = rest * jax.nn.sigmoid(-logits) * jax.nn.silu(widen(self.candidate(x)))
        h, last = linear_scan(
            keep, write, reset, state.h, implementation=self.config.implementation
        )
        gate = widen(self.gate(x))
        y = jax.nn.sigmoid(gate) * h if self.norm is None else self.norm(gate) * jax.nn.silu(h)
        return self.out(y.astype(x.dtype)), State(last)

    def _bound(self):
        """b and 1 - b, [D] each"""
        if self.bounds is None:
            return 0.0, 1.0
        p, n = jax.nn.softmax(widen(self.bounds[...]), 0), self.config.layer
        return jnp.sum(p[1 : n + 1], 0), p[0] + jnp.sum(p[n + 1 :], 0)


def _linear(d: int, axes: tuple[str, str], rngs: nnx.Rngs) -> Linear:
    """A square map that starts uniform as its authors' does (Xavier, gain 2^-2.5)."""
    linear, largest = Linear(d, d, axes, rngs=rngs), 2**-2.5 * (3 / d) ** 0.5
    uniform = jax.random.uniform(rngs.params(), (d, d), jnp.float32, -largest, largest)
    linear.weight = nnx.Param(uniform, axes=axes)
    return linear
