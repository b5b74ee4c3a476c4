"""Titans with memory as a layer (Behrouz, Zhong & Mirrokni, 2024, section 4.3): a memory that
learns while it reads, and attention in a sliding window over what it says."""

from typing import NamedTuple

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
    """`memory` reads the input, `attention` what the memory makes of it."""

    memory: neural_memory.Config = neural_memory.Config()
    attention: window_attention.Config = window_attention.Config()
    norm_eps: PositiveFinite = 1e-6

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "TitansMAL":
        return TitansMAL(self, d_model, rngs=rngs)


class State(NamedTuple):
    memory: neural_memory.State
    attention: window_attention.State


class TitansMAL(Mixer):
    """y = attention(norm(memory(x))) W_out

    The norm between is ours. Persistent tokens stand before attention, as keys that every query
    sees; in front of the memory they would change only what it starts with, which is learned.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.memory = NeuralMemory(config.memory, d_model, rngs=rngs)
        self.norm = RMSNorm(d_model, eps=config.norm_eps)
        self.attention = WindowAttention(config.attention, d_model, rngs=rngs)
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        return State(self.memory.init_state(batch), self.attention.init_state(batch))

    def mix(self, x, state: State, reset):
        remembered, memory = self.memory(x, state.memory, reset)
        y, attention = self.attention(self.norm(remembered), state.attention, reset)
        return self.out(y), State(memory, attention)
