"""A learned vector for each place in a document, added to what stands there: GPT-2's positions.

Gehring et al. (2017); Radford et al. (2019).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.layers.document_length import refuse_overflow
from seqlab.layers.mixer import Mixer
from seqlab.layers.rope import positions
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """A document may have `max_length` tokens. Vectors start normal with standard deviation `std`.

    It stands alone in a block in front of a model's others, whose join has the place "none".
    """

    max_length: PositiveInt = 256
    std: PositiveFinite = 0.02

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "LearnedPositions":
        return LearnedPositions(self, d_model, rngs=rngs)


class State(NamedTuple):
    position: jax.Array  # [B] int32, of the next token


class LearnedPositions(Mixer):
    """y_t = table[how many tokens of its document come before t], whatever x is.

    A document that outgrows the table raises ModelError where its position is known, and inside
    jax.jit is NaN from the first token too many on.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.max_length = config.max_length
        table = jax.random.normal(rngs.params(), (config.max_length, d_model), jnp.float32)
        self.table = nnx.Param(config.std * table, axes=(None, "embed"))

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        position = positions(reset, state.position)
        refuse_overflow(position, self.config.max_length, "A table of learned positions")
        y = jnp.take(self.table[...], position, axis=0, mode="fill", fill_value=jnp.nan)
        return y.astype(x.dtype), State(position[:, -1] + 1)
