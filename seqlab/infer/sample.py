"""Choosing the next token: the likeliest, or one drawn among those that the filters leave."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Sampling:
    """How to draw a token; temperature 0 takes the likeliest and ignores the filters.

    The filters apply in the order of the fields, each on what the one before left:
    top_k keeps the k likeliest tokens; top_p (nucleus sampling, Holtzman et al., 2020) the fewest
    likeliest whose probabilities reach p; min_p (Nguyen et al., 2024) those at least p times as
    probable as the likeliest. None is no filter. Tokens that tie with the last one kept stay.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 (greedy) or more, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be between 0 and 1, not {self.min_p}.")

    @property
    def numbers(self) -> dict[str, float]:
        """The settings that a compiled program takes as arguments; one that is off is absent.

        With `top_k`, a shape, they determine the program: another temperature compiles nothing.
        """
        if self.temperature == 0:
            return {}
        on = {"temperature": self.temperature}
        if self.top_p is not None and self.top_p < 1:
            on["top_p"] = self.top_p
        if self.min_p:
            on["min_p"] = self.min_p
        return on


GREEDY = Sampling()


def row_keys(seed: int, rows: int) -> jax.Array:
    """[rows] keys, one a row of a batch: a row's does not depend on how many rows there are."""
    key = jax.random.key(seed, impl="threefry2x32")  # the same draws whatever the user's default
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """logits [B, V] float32, one key a row [B] -> tokens [B] int32.

    A row's token depends on its own logits and key alone; a row that holds NaN gets some token.
    """
    return draw(logits, keys, sampling.numbers, sampling.top_k)


def draw(logits: jax.Array, keys: jax.Array, numbers: dict, top_k: int | None) -> jax.Array:
    """`sample` with the settings as `Sampling.numbers` and `Sampling.top_k`, inside jit."""
    if not numbers:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    tokens = jax.vmap(jax.random.categorical)(keys, filtered(logits, numbers, top_k))
    return tokens.astype(jnp.int32)


def filtered(logits: jax.Array, numbers: dict, top_k: int | None) -> jax.Array:
    """Logits at the given temperature with -inf where a filter took the token; [B, V] both.

    Each row is shifted so that its largest logit is 0, so no temperature overflows.
    """
    logits = (logits - logits.max(-1, keepdims=True)) / numbers["temperature"]
    if top_k is not None and top_k < logits.shape[-1]:
        logits = _drop_below(logits, lax.top_k(logits, top_k)[0][:, -1:])
    if "top_p" in numbers:
        ranked = jnp.sort(logits, -1, descending=True)
        probabilities = jax.nn.softmax(ranked)
        before = jnp.cumsum(probabilities, -1) - probabilities
        kept = jnp.where(before < numbers["top_p"], ranked, jnp.inf)
        logits = _drop_below(logits, kept.min(-1, keepdims=True))
    if "min_p" in numbers:
        logits = _drop_below(logits, jnp.log(numbers["min_p"]))
    return logits


def _drop_below(logits: jax.Array, least: jax.Array) -> jax.Array:
    return jnp.where(logits < least, -jnp.inf, logits)
