"""Titans with memory as a gate (Behrouz, Zhong & Mirrokni, 2024, section 4.2): attention in a
sliding window, and beside it a memory that learns while it reads, which gates what attention says.
"""

from typing import NamedTuple

import jax
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.layers import neural_memory, window_attention
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.neural_memory import NeuralMemory
from seqlab.layers.norm import RMSNorm
from seqlab.layers.window_attention import WindowAttention
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`attention` sees its window and the persistent tokens, `memory` remembers what is behind."""

    attention: window_attention.Config = window_attention.Config()
    memory: neural_memory.Config = neural_memory.Config()
    norm_eps: PositiveFinite = 1e-6

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "TitansMAG":
        return TitansMAG(self, d_model, rngs=rngs)


class State(NamedTuple):
    attention: window_attention.State
    memory: neural_memory.State


class TitansMAG(Mixer):
    """y = (norm(attention(x)) * sigmoid(norm(memory(x)))) W_out

    Both norms have weights of their own. The paper says that the two are normed and combined by a
    non-linearity, not which: the sigmoid is ours. Persistent tokens are keys that every query sees;
    in front of the memory they would change only what it starts with, which is learned already.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.attention = WindowAttention(config.attention, d_model, rngs=rngs)
        self.memory = NeuralMemory(config.memory, d_model, rngs=rngs)
        self.attention_norm, self.memory_norm = (
            RMSNorm(d_model, eps=config.norm_eps) for _ in range(2)
        )
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        return State(self.attention.init_state(batch), self.memory.init_state(batch))

    def mix(self, x, state: State, reset):
        said, attention = self.attention(x, state.attention, reset)
        remembered, memory = self.memory(x, state.memory, reset)
        gate = jax.nn.sigmoid(self.memory_norm(remembered))
        return self.out(self.attention_norm(said) * gate), State(attention, memory)
