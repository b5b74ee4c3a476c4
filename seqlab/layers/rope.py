"""Positions within documents, and rotary position embedding (Su et al., 2021, RoFormer, eq. 34).

The ways to stretch a trained rotation over longer texts: linear (Chen et al., 2023), Llama 3.1's
(Grattafiori et al., 2024), YaRN (Peng et al., 2023, section 3.2 and eq. 21-22), and LongRoPE (Ding
et al., 2024).
"""

import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Linear:
    """Every frequency divided by `factor`."""

    factor: PositiveFinite
    kind: Literal["linear"] = "linear"

    gain = 1.0

    def stretch(self, frequency: np.ndarray, base: float) -> np.ndarray:
        return frequency / self.factor


@dataclass(frozen=True, config=STRICT)
class Llama3:
    """Waves that fit `low` times or less into the trained length are divided by `factor`, those
    that fit `high` times or more are kept, and between the two it changes over."""

    factor: PositiveFinite
    length: PositiveInt  # in tokens, of what was trained before
    low: PositiveFinite = 1.0
    high: PositiveFinite = 4.0
    kind: Literal["llama3"] = "llama3"

    gain = 1.0

    def stretch(self, frequency: np.ndarray, base: float) -> np.ndarray:
        times = self.length * frequency / (2 * math.pi)
        kept = np.clip((times - self.low) / (self.high - self.low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, config=STRICT)
class Yarn:
    """The same, linearly between the channels whose waves fit `slow` and `fast` times; queries and
    keys are multiplied by `gain`, which the paper has as 0.1 log(factor) + 1."""

    factor: PositiveFinite
    length: PositiveInt  # in tokens, of what was trained before
    fast: PositiveFinite = 32.0
    slow: PositiveFinite = 1.0
    truncate: bool = True  # the two channels to whole numbers
    gain: PositiveFinite = 1.0
    kind: Literal["yarn"] = "yarn"

    def stretch(self, frequency: np.ndarray, base: float) -> np.ndarray:
        half = len(frequency)
        low, high = (self._channel(times, half, base) for times in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        stretched = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        return frequency * (1 - stretched + stretched / self.factor)

    def _channel(self, times: float, half: int, base: float) -> float:
        """The channel, between the whole ones, whose wave fits so many times into the length."""
        return half * math.log(self.length / (times * 2 * math.pi)) / math.log(base)


@dataclass(frozen=True, config=STRICT)
class LongRope:
    """Every frequency divided by a factor of its own, found by search; queries and keys multiplied
    by `gain`.

    The factors are those of `long` if texts may have more tokens than the model was trained with,
    `max_length` rather than `length`, else those of `short`. They stay the same while a text grows:
    the keys that a state keeps have been turned by them.
    """

    short: tuple[PositiveFinite, ...]
    long: tuple[PositiveFinite, ...]
    length: PositiveInt
    max_length: PositiveInt
    gain: PositiveFinite = 1.0
    kind: Literal["longrope"] = "longrope"

    def stretch(self, frequency: np.ndarray, base: float) -> np.ndarray:
        factors = self.long if self.max_length > self.length else self.short
        if len(factors) != len(frequency):
            raise ConfigError(
                f"rope_scaling: longrope has {len(factors)} factors for {len(frequency)} "
                "frequencies: give one for each pair of channels that turns."
            )
        return frequency / np.array(factors)


#: The ways to stretch a rotation.
Stretched = Linear | Llama3 | Yarn | LongRope

#: One of them as a field of a config, told apart by `kind` in JSON.
Scaling = Annotated[Stretched, Field(discriminator="kind")]


def positions(reset: jax.Array, start: jax.Array) -> jax.Array:
    """How many tokens of its own document come before each token.

    reset [B, T] bool, true where a document starts; start [B] int32, the position of the first
    token if no document starts there. Returns [B, T] int32.
    """
    t = jnp.arange(reset.shape[1], dtype=jnp.int32)
    began = jax.lax.cummax(jnp.where(reset, t, -start[:, None]), axis=1)
    return t - began


def frequencies(channels: int, base: float, scaling: Stretched | None = None) -> np.ndarray:
    """What each pair of `channels` turns by from a token to the next, in radians: [channels / 2].

    Raises ConfigError where the scaling is for another number of channels."""
    frequency = base ** (-np.arange(channels // 2) / (channels // 2))
    return frequency if scaling is None else scaling.stretch(frequency, base)


def rope(
    x: jax.Array,
    positions: jax.Array,
    base: float,
    *,
    channels: int | None = None,
    scaling: Stretched | None = None,
) -> jax.Array:
    """Rotate channel pairs (i, i + R/2) by position * base^(-2i/R); scores then see distances only.

    x [B, T, H, K], positions [B, T] -> [B, T, H, K] in the dtype of x. R is `channels`, even, and K
    unless given; the channels behind are left as they are. Channels pair up across the halves of R,
    as in Llama's weights, not with their neighbours.
    """
    wide, rotated = widen(x), x.shape[-1] if channels is None else channels
    frequency = jnp.asarray(frequencies(rotated, base, scaling), wide.dtype)
    gain = 1.0 if scaling is None else scaling.gain
    angle = positions[..., None, None].astype(wide.dtype) * frequency
    cos, sin = (wave * gain for wave in _waves(angle))  # [B, T, 1, R / 2]
    a, b, rest = jnp.split(wide, [rotated // 2, rotated], -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


def _waves(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Its cosine and sine. On a CPU they come out of a loop, or XLA would compute them within the
    rotation, again for every head: most of the time that rotating took."""
    both = jnp.cos, jnp.sin
    turns = lambda angle: tuple(
        jax.lax.map(lambda i: jax.lax.switch(i, both, angle), jnp.arange(2))
    )
    plain = lambda angle: (jnp.cos(angle), jnp.sin(angle))
    return jax.lax.platform_dependent(angle, cpu=turns, default=plain)
