"""What a batch asks of a model: what it is shown, what it must name, and what each label weighs."""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.layers.rope import positions
from seqlab.models.lm import LM
from seqlab.settings import STRICT, PositiveFinite
from seqlab.train.corpus import Batch


class Asked(NamedTuple):
    """The loss is the sum of weights times cross-entropies over the number of weights above 0.

    Weights belong to the batch as a whole, so its parts add up to it.
    """

    tokens: jax.Array  # [B, T] int32, as the model is shown them
    segment_ids: jax.Array  # [B, T] int32, of the documents they are in; 0 = padding
    labels: jax.Array  # [B, T] int32
    weights: jax.Array  # [B, T] float32, 0 where nothing is asked

    @property
    def reset(self) -> jax.Array:
        """[B, T] bool, where a document starts; at the first token the state is empty as it is."""
        return jnp.diff(self.segment_ids, axis=1, prepend=self.segment_ids[:, :1]) != 0


@dataclass(frozen=True, config=STRICT)
class NextToken:
    """Each token given those before it in its own document."""

    kind: Literal["next_token"] = "next_token"

    def check(self, model: LM, length: int) -> None:
        """Raises ConfigError where a model, or rows of so many tokens, cannot be asked this."""
        if model.prefix:
            raise ConfigError(
                f"The first {model.prefix} tokens that this model reads see one another, the next "
                f"one too: give objective=Prefix(prefix_len={model.prefix}, mask=...)."
            )

    def ask(self, batch: Batch, key: Any = None) -> Asked:
        """`key` draws what is random in the question; without one it is that of an evaluation."""
        here, there = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
        tokens = jnp.asarray(batch.tokens)
        counts = (here == there) & (there > 0)
        return Asked(tokens[:, :-1], jnp.asarray(here), tokens[:, 1:], counts * jnp.float32(1))


NEXT_TOKEN = NextToken()


@dataclass(frozen=True, config=STRICT)
class Prefix:
    """For models whose first `prefix_len` tokens of a document see one another (Arora et al., 2024,
    Just Read Twice): there, where a next token would be no secret, a share `rate` of the tokens is
    replaced by the id `mask` and asked for; beyond, every next token is.

    loss = mean over next tokens + weight * mean over masked tokens
    """

    prefix_len: PositiveInt
    mask: NonNegativeInt
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    weight: PositiveFinite = 0.25
    kind: Literal["prefix"] = "prefix"

    def check(self, model: LM, length: int) -> None:
        """Raises ConfigError where a model, or rows of so many tokens, cannot be asked this."""
        if model.prefix != self.prefix_len:
            raise ConfigError(
                f"objective.prefix_len = {self.prefix_len} but the prefix of the model is "
                f"{model.prefix}: make them equal."
            )
        if length <= self.prefix_len:
            raise ConfigError(
                f"data.length = {length} leaves no token beyond objective.prefix_len = "
                f"{self.prefix_len}: lengthen the one or shorten the other."
            )
        if self.mask >= model.config.vocab:
            raise ConfigError(
                f"objective.mask = {self.mask} is outside the vocabulary of {model.config.vocab}: "
                f"set model.vocab={self.mask + 1}, or another mask."
            )

    def ask(self, batch: Batch, key: Any = None) -> Asked:
        """Without a key nothing is masked, and the next tokens beyond the prefix are asked for."""
        asked = NEXT_TOKEN.ask(batch)
        start = jnp.zeros(len(asked.tokens), jnp.int32)
        within = positions(asked.reset, start) < self.prefix_len
        following = (asked.weights > 0) & ~within
        if key is None:
            return asked._replace(weights=following * jnp.float32(1))
        drawn = jax.random.bernoulli(key, self.rate, within.shape)
        masked = drawn & within & (asked.segment_ids > 0)
        n, m = jnp.sum(following), jnp.sum(masked)
        share = lambda where, count: where * ((n + m) / jnp.maximum(count, 1))
        return asked._replace(
            tokens=jnp.where(masked, self.mask, asked.tokens),
            labels=jnp.where(masked, asked.tokens, asked.labels),
            weights=share(following, n) + self.weight * share(masked, m),
        )


#: What to train for, as a field of a config: told apart in JSON by its kind.
Objective = Annotated[NextToken | Prefix, Field(discriminator="kind")]
