"""A mixer that compiles at once and whose bits do not depend on the cut: it only ever steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.layers.mixer import Mixer
from seqlab.models import lm

VOCAB = 17


@dataclass(frozen=True)
class Config:
    max_length: int | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Leaky":
        return Leaky(self, d_model, rngs=rngs)


class State(NamedTuple):
    memory: jax.Array  # [B, D]
    length: jax.Array  # [B] int32


class Leaky(Mixer):
    """m_t = tanh(a m_{t-1} + x_t), y_t = m_t"""

    def __init__(self, config: Config, d: int, *, rngs: nnx.Rngs):
        self.max_length = config.max_length
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (d,)), axes=(None,))

    def init_state(self, batch: int) -> State:
        return State(jnp.zeros((batch, self.weight.shape[0])), jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        def step(state, token):
            x, reset = token
            memory = jnp.where(reset[:, None], 0, state.memory)
            state = State(
                jnp.tanh(self.weight[...] * memory + x), jnp.where(reset, 0, state.length) + 1
            )
            return state, state.memory

        state, y = jax.lax.scan(step, state, (x.swapaxes(0, 1), reset.T))
        return y.swapaxes(0, 1).astype(x.dtype), state


def tiny(
    seed: int = 0, max_length: int | None = None, d_model: int = 16, vocab: int = VOCAB
) -> lm.LM:
    """A model whose next token depends on all that it has read."""
    pattern = (Config(), Config(max_length))
    config = lm.Config(
        vocab=vocab, d_model=d_model, pattern=pattern, repeats=2, ffn=None, tie_embeddings=False
    )
    return config.build(rngs=nnx.Rngs(seed))
