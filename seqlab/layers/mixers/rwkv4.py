"""RWKV-4 (Peng et al., 2023): a decaying average of values, weighed by exponentials of keys."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.linear_scan import linear_scan
from seqlab.kernels.maxplus_scan import stabilise
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.token_shift import previous
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """`width` channels, by default d_model; this is layer `layer` of `layers`, which says where the
    mixing weights and the decays start."""

    width: PositiveInt | None = None
    layer: NonNegativeInt = 0
    layers: PositiveInt = 1
    implementation: str | None = None

    def __post_init__(self):
        if self.layer >= self.layers:
            raise ConfigError(
                f"rwkv4: there is no layer {self.layer} in {self.layers}: count from 0."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV4":
        return RWKV4(self, d_model, rngs=rngs)


class State(NamedTuple):
    previous: jax.Array  # [B, D], the last token
    sums: tuple  # numerator and denominator [B, E], in units of e^largest
    largest: jax.Array  # [B, E], -inf before the first token


class RWKV4(Mixer):
    """y_t = (sigmoid(r_t) * (a_{t-1} + e^(u + k_t) v_t) / (b_{t-1} + e^(u + k_t))) W_out

    a_t = e^w a_{t-1} + e^(k_t) v_t and b_t = e^w b_{t-1} + e^(k_t), with w = -e^decay. Each of r,
    k, v sees mu x_t + (1 - mu) x_{t-1}.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, D = config, d_model
        self.config, self.width = c, c.width or D
        deep, shallow = c.layer / max(c.layers - 1, 1), 1 - c.layer / c.layers
        channel, n = jnp.arange(D) / D, jnp.arange(self.width)
        self.mu_k = nnx.Param(channel**shallow, axes=(None,))
        self.mu_v = nnx.Param(channel**shallow + 0.3 * deep, axes=(None,))
        self.mu_r = nnx.Param(channel ** (0.5 * shallow), axes=(None,))
        place = n / max(self.width - 1, 1)
        self.decay = nnx.Param(-5 + 8 * place ** (0.7 + 1.3 * deep), axes=("heads",))
        self.bonus = nnx.Param(math.log(0.3) + 0.5 * ((n + 1) % 3 - 1.0), axes=("heads",))
        into = lambda: Linear(D, self.width, ("embed", "heads"), rngs=rngs)
        self.key, self.value, self.receptance = into(), into(), into()
        self.out = Linear(self.width, D, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        empty = jnp.zeros((batch, self.width), jnp.float32)
        last = jnp.zeros((batch, self.mu_k.shape[0]), jnp.float32)
        return State(last, (empty, empty), jnp.full_like(empty, -jnp.inf))

    def mix(self, x, state: State, reset):
        before, last = previous(x, state.previous, reset)
        seen = lambda mu: before + (x - before) * mu[...].astype(x.dtype)
        k, v = widen(self.key(seen(self.mu_k))), widen(self.value(seen(self.mu_v)))
        decay = jnp.broadcast_to(-jnp.exp(self.decay[...]), k.shape)
        gates, largest = stabilise(decay, k, reset, state.largest, initial=-jnp.inf)
        keep, write = jnp.exp(gates.log_decay), jnp.exp(gates.log_input)
        summed = functools.partial(linear_scan, implementation=self.config.implementation)
        a, last_a = summed(keep, write * v, reset, state.sums[0])
        b, last_b = summed(keep, write, reset, state.sums[1])
        y = self._read(k, v, State(before, (a, b), gates.m), state, reset)
        y = jax.nn.sigmoid(self.receptance(seen(self.mu_r))) * y.astype(x.dtype)
        return self.out(y), State(last, (last_a, last_b), largest)

    def _read(self, k, v, states, first, reset):
        """The averages [B, T, E] from the sums after every token, and before the first."""
        earlier = lambda after, start: previous(after, start, reset)[0]
        a, b = (earlier(*pair) for pair in zip(states.sums, first.sums, strict=True))
        m = jnp.where(reset[..., None], -jnp.inf, earlier(states.largest, first.largest))
        now = k + self.bonus[...]
        unit = jax.lax.stop_gradient(jnp.maximum(m, now))  # the quotient does not depend on it
        past, now = jnp.exp(m - unit), jnp.exp(now - unit)
        return (past * a + now * v) / (past * b + now)
