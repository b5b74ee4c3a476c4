"""Lightning attention (TransNormer, Qin et al., 2023; MiniMax, 2025): linear attention whose heads
forget at fixed rates, less the deeper the layer."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.precision import widen
from seqlab.layers.ffn import ACTIVATIONS, Activation
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """This is layer `layer` of `layers`. Slopes are "geometric" over the heads (MiniMax) or
    "linear" (TransNormer, whose first head forgets nothing). head_dim defaults to d_model / heads.
    """

    heads: PositiveInt = 4
    head_dim: PositiveInt | None = None
    slopes: Literal["geometric", "linear"] = "geometric"
    layer: NonNegativeInt = 0
    layers: PositiveInt = 1
    activation: Activation = "silu"  # of q, k and v
    norm_eps: PositiveFinite = 1e-6
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"lightning: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Lightning":
        if self.head_dim is None and d_model % self.heads:
            raise ConfigError(
                f"lightning: d_model={d_model} does not divide by {self.heads} heads."
            )
        return Lightning(self, d_model, rngs=rngs)

    def log_decay(self) -> np.ndarray:
        """[heads], of one token"""
        H, depth = self.heads, self.layer
        if self.slopes == "linear":
            return -(8 / H) * (1 - depth / self.layers) * np.arange(H)
        less = 1 - depth / (self.layers - 1 + 1e-5) + 1e-5
        return -(2.0 ** (-8 * np.arange(1, H + 1) / H)) * less


class State(NamedTuple):
    memory: jax.Array  # [B, H, K, K]


class Lightning(Mixer):
    """q, k, v = silu(W x);  S_t = e^-s S_{t-1} + k_t v_t^T, with the slope s of the head and layer

    y_t = (norm(S_t^T q_t) * sigmoid(x_t W_gate)) W_out, normed over all heads at once.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.K = c.head_dim or d_model // c.heads
        inner = c.heads * self.K
        # for each head its q, its k and its v
        self.qkv = Linear(d_model, 3 * inner, ("embed", "heads"), rngs=rngs)
        self.gate = Linear(d_model, inner, ("embed", "heads"), rngs=rngs)
        self.norm = RMSNorm(inner, eps=c.norm_eps)
        self.out = Linear(inner, d_model, ("heads", "embed"), rngs=rngs)

    @property
    def projections(self):
        return {"qkv": (("q", self.K), ("k", self.K), ("v", self.K)) * self.config.heads}

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.config.heads, self.K, self.K), jnp.float32))

    def mix(self, x, state: State, reset):
        c = self.config
        q, k, v = jnp.split(heads(ACTIVATIONS[c.activation](self.qkv(x)), c.heads), 3, -1)
        y, memory = decayed_outer_product(
            q,
            k,
            v,
            jnp.broadcast_to(c.log_decay()[:, None], (*v.shape[:3], 1)).astype(widen(x).dtype),
            reset,
            state.memory,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        return self.out(self.norm(merge(y)) * jax.nn.sigmoid(self.gate(x))), State(memory)
