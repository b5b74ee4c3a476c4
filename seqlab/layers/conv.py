"""Short causal depthwise convolution: itself a mixer, whose state is the last width - 1 inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.kernels.short_conv import short_conv
from seqlab.layers.mixer import Mixer


class State(NamedTuple):
    inputs: jax.Array  # [B, W - 1, D], of the current document; zero where there were none


class ShortConv(Mixer):
    """y_t = sum_j weight[j] x_{t - W + 1 + j} (+ bias), reading zeros across a document's start.

    The last tap multiplies the current token. Taps start uniform in +-width^-0.5 (the default of
    depthwise convolutions in the Mamba papers' code), or normal with standard deviation `std`; the
    bias starts at zero.
    """

    def __init__(
        self, d: int, width: int, *, bias: bool = False, std: float | None = None, rngs: nnx.Rngs
    ):
        if std is None:
            bound = width**-0.5
            taps = jax.random.uniform(rngs.params(), (width, d), jnp.float32, -bound, bound)
        else:
            taps = std * jax.random.normal(rngs.params(), (width, d), jnp.float32)
        self.weight = nnx.Param(taps, axes=(None, "heads"))
        self.bias = nnx.Param(jnp.zeros(d, jnp.float32), axes=("heads",)) if bias else None

    def init_state(self, batch: int) -> State:
        width, d = self.weight.shape
        return State(jnp.zeros((batch, width - 1, d), jnp.float32))

    def mix(self, x, state: State, reset):
        y, inputs = short_conv(self.weight[...].astype(x.dtype), x, reset, state.inputs)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        return y, State(inputs)
