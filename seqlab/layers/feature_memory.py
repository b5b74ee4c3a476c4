"""What attention becomes when its softmax is replaced by a feature map: a matrix memory, written
with the features of a pretrained model's keys and read with those of its queries.

Kasai et al. (2021, T2R); Zhang et al. (2024, Hedgehog); Mercat et al. (2024, SUPRA); Zhang et al.
(2024, LoLCATs); Lan et al. (2025, Liger); Nguyen et al. (2025, Lizard). Gated slots: Zhang et al.
(2024, GSA).
"""

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.decay import BLOCK
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.precision import widen
from seqlab.layers import feature_maps
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.norm import LayerNorm
from seqlab.settings import STRICT, PositiveFinite

#: log a of a gate g
FORMS = {"sigmoid": jax.nn.log_sigmoid, "softplus": lambda g: -jax.nn.softplus(g)}

#: log a of each of H heads: ALiBi's slopes (Press et al., 2022), RetNet's rates (Sun et al., 2023)
RATES = {
    "alibi": lambda H: -(2.0 ** (-8 * np.arange(1, H + 1) / H)),
    "retention": lambda H: np.log1p(-(2.0 ** (-5 - np.arange(H)))),
}


@dataclass(frozen=True, config=STRICT)
class Config:
    """How queries and keys become features phi(q) and phi(k), what decays, what is written.

    feature_map   of each head, or with map_over="width" of all heads side by side; one map for
                  queries and keys if tied
    rope          whether queries and keys turn with their positions, before the map or after it
    scale         multiply phi(q) . phi(k) by (number of features) ** -0.5

    decay         a_t of each head and feature: 1, or by a gate g, which is k_t ("key") or, one for
                  all heads, x_t w + b ("token"), or for each head a rate of its own ("fixed")
    decay_form    a_t is sigmoid(g) or exp(-softplus(g)), to the power `decay_power`
    decay_width   a head's keys are averaged to so many gates; 1 is one a head, None one a channel
    decay_normed  whether gates are keys as they are normed, or as they are projected
    decay_bias    b at the start; None for no b
    decay_rates   of "fixed": see RATES

    write         S_t = a_t S_{t-1} + phi(k_t) v_t^T;  with "forgotten" 1 - a_t is in the place of
                  phi(k_t); with "slots" it is how much each of as many slots takes of k_t and v_t,
                  and a query reads the values of all slots under a softmax over their keys
    norm          y is divided by the sum of its weights ("own"), normed within each head
                  ("groupnorm"), or neither; `eps` is added to the divisor
    """

    feature_map: feature_maps.Config = feature_maps.Config("softmax")
    map_over: Literal["head", "width"] = "head"
    tie_feature_map: bool = False
    rope: Literal["none", "before", "after"] = "none"
    scale: bool = False
    decay: Literal["none", "key", "token", "fixed"] = "key"
    decay_form: Literal["sigmoid", "softplus"] = "sigmoid"
    decay_power: PositiveFinite = 1.0
    decay_width: PositiveInt | None = None
    decay_normed: bool = False
    decay_bias: Annotated[float, Field(allow_inf_nan=False)] | None = 3.0
    decay_rates: Literal["alibi", "retention"] = "alibi"
    write: Literal["features", "forgotten", "slots"] = "features"
    norm: Literal["none", "own", "groupnorm"] = "none"
    eps: PositiveFinite = 1e-6
    chunk_size: PositiveInt = 16

    def __post_init__(self):
        if self.norm == "own" and self.feature_map.kind in feature_maps.SIGNED:
            raise ConfigError(
                f"feature memory: scores under the feature map {self.feature_map.kind!r} may sum "
                "to zero: set another norm, or take a positive map."
            )
        if self.write != "features" and (self.decay != "key" or self.norm == "own"):
            raise ConfigError(
                f"feature memory: write={self.write!r} writes what a gate of each channel forgets: "
                'it needs decay="key" and a norm other than "own".'
            )


class Read(NamedTuple):
    y: jax.Array  # [B, T, H, V] in the dtype of v
    total: jax.Array | None  # [B, T, H] float32, the sum of the weights in y, if it is wanted


class FeatureMemory(nnx.Module):
    """The memories of H heads of width d, for queries of H heads and keys and values of G."""

    def __init__(self, config: Config, d_model: int, H: int, G: int, d: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.H, self.d = H, d
        wide = c.map_over == "width"
        of = lambda n: c.feature_map.build(*((n * d, 1) if wide else (d, H)), rngs=rngs)
        keys_map = c.write == "features" and not c.tie_feature_map
        if wide and c.tie_feature_map and G < H:
            raise ConfigError(
                f"feature memory: keys of {G} heads cannot share the map over the width of {H}: "
                "set tie_feature_map=False."
            )
        self.feature_map_q = of(H)
        self.feature_map_k = of(G) if keys_map else None
        self.features = self.feature_map_q.width // (H if wide else 1)
        self.gates = c.decay_width or d
        self._check()
        self.decay = _token_gate(c.decay_bias, d_model, rngs) if c.decay == "token" else None
        plain = c.norm == "groupnorm"
        self.norm = LayerNorm(d, eps=c.eps, weight=False, bias=False) if plain else None

    def _check(self) -> None:
        c, d = self.config, self.d
        if c.rope == "after" and self.features != d:
            raise ConfigError(
                f"feature memory: {self.features} features of a head of {d} channels cannot turn "
                'with its positions: take a map that keeps the width, or rope="before".'
            )
        if c.decay == "key" and d % self.gates:
            raise ConfigError(
                f"feature memory: decay_width={self.gates} does not divide the {d} channels of a "
                "key: take a divisor."
            )
        fits = {"features": (1, self.features), "forgotten": (self.features,)}
        if c.decay == "key" and self.gates not in fits.get(c.write, (self.gates,)):
            raise ConfigError(
                f"feature memory: {self.gates} gates cannot decay {self.features} features: set "
                f"decay_width to {' or '.join(map(str, fits[c.write]))}."
            )

    def init_state(self, batch: int) -> tuple[jax.Array, ...]:
        """[B, H, F, V], with a column more for sums of weights; of slots the keys [B, H * M, K, 1]
        and the values [B, H, M, V]."""
        H, d, M, c = self.H, self.d, self.gates, self.config
        sizes = [(H, self.features, d + (c.norm == "own"))]
        if c.write == "slots":
            sizes = [(H * M, d, 1), (H, M, d)]
        return tuple(jnp.zeros((batch, *size), jnp.float32) for size in sizes)

    def __call__(self, x, q, k, v, gate, valid, turn, reset, state, implementation=None):
        """Read [B, T, ...] and the state after it.

        x [B, T, D], what token gates are made of; q [B, T, H, d]; k, v [B, T, G, d]; gate
        [B, T, G, d], the keys that key gates are; valid [B, T], false where nothing is written;
        turn rotates [B, T, H, d].
        """
        c, log_decay = self.config, self._log_decay(x, gate)
        every = lambda a: jnp.repeat(a, self.H // a.shape[2], 2)
        options = {"implementation": implementation, "chunk_size": c.chunk_size}
        q, v = self._features(q, self.feature_map_q, turn), every(v)
        q = q * q.shape[-1] ** -0.5 if c.scale else q
        if c.write == "slots":
            return self._slots(q, every(k), v, log_decay, reset, state, options)
        if c.write == "forgotten":
            k = -jnp.expm1(log_decay).astype(v.dtype)
        else:
            k = k if c.map_over == "width" else every(k)
            k = every(self._features(k, self.feature_map_k or self.feature_map_q, turn))
        k = k if valid is None else jnp.where(valid[..., None, None], k, 0)
        own = c.norm == "own"
        y, memory = decayed_outer_product(
            q, k, v, log_decay, reset, *state, normaliser=own, **options
        )
        return Read(*y) if own else Read(y, None), (memory,)

    def normed(self, read: Read) -> jax.Array:
        """y [B, T, H, V], as `norm` says."""
        if read.total is not None:
            return (read.y / (read.total + self.config.eps)[..., None]).astype(read.y.dtype)
        return read.y if self.norm is None else self.norm(read.y)

    def _features(self, a, phi, turn):
        """[B, T, n, d] -> [B, T, n, F], or of what all n heads share [B, T, H, F]"""
        n = a.shape[2]
        over = heads(merge(a), 1) if self.config.map_over == "width" else a
        a = heads(merge(phi(over)), n)
        return turn(a) if self.config.rope == "after" else a

    def _log_decay(self, x, gate):
        """[B, T, H, gates or 1], at most 0"""
        c, shape = self.config, (*x.shape[:2], self.H, 1)
        if c.decay in ("none", "fixed"):
            rates = np.zeros(self.H) if c.decay == "none" else RATES[c.decay_rates](self.H)
            return jnp.broadcast_to(rates[:, None], shape).astype(widen(x).dtype)
        if self.decay is not None:
            gate = widen(self.decay(x))[..., None]
        else:
            gate = jnp.mean(widen(gate).reshape(*gate.shape[:3], self.gates, -1), -1)
        log_decay = FORMS[c.decay_form](gate) * c.decay_power
        return jnp.repeat(log_decay, self.H // gate.shape[2], 2)

    def _slots(self, q, k, v, log_decay, reset, state, options):
        """Of each slot a memory of keys, [K, 1], that decays as it does; then one of values."""
        takes, (keys, values) = -jnp.expm1(log_decay), state  # takes [B, T, H, M]
        apart = lambda a: heads(merge(a), self.H * self.gates)  # [B, T, H * M, 1]
        # heads of one value each: all M of a head read the same keys with the same query
        options["chunk_size"] = BLOCK  # their decays are M matrices a chunk, of the chunk squared
        scores, keys = decayed_outer_product(
            q, k, apart(takes), apart(log_decay), reset, keys, **options
        )
        chosen = jax.nn.softmax(scores.reshape(takes.shape)).astype(v.dtype)
        options["chunk_size"] = self.config.chunk_size
        y, values = decayed_outer_product(
            chosen, takes.astype(v.dtype), v, log_decay, reset, values, **options
        )
        return Read(y, None), (keys, values)


def _token_gate(bias: float | None, d_model: int, rngs: nnx.Rngs) -> Linear:
    """x w + b, w zero at the start."""
    gate = Linear(d_model, 1, ("embed", None), bias=bias is not None, std=0.0, rngs=rngs)
    if bias is not None and gate.bias is not None:
        gate.bias[...] += bias
    return gate
