"""Titans with memory as a context (Behrouz, Zhong & Mirrokni, 2024, section 4.1): what a memory
says about a segment is put beside it before attention, and attention decides what it learns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.precision import widen
from seqlab.kernels.test_time_memory.segments import scan_segments
from seqlab.layers import neural_memory, segment_attention
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.neural_memory import NeuralMemory
from seqlab.layers.norm import RMSNorm
from seqlab.layers.segment_attention import SegmentAttention
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """Attention has `heads` and sees `persistent` learned tokens; a segment is a chunk of the
    memory, memory.chunk_size tokens from the document's start (memory.implementation says nothing
    here: there is one)."""

    heads: PositiveInt = 4
    persistent: NonNegativeInt = 4
    rope_base: PositiveFinite | None = 10_000.0
    memory: neural_memory.Config = neural_memory.Config()
    norm_eps: PositiveFinite = 1e-6

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "TitansMAC":
        if d_model % self.heads or (self.rope_base is not None and d_model // self.heads % 2):
            raise ConfigError(
                f"titans_mac: d_model={d_model} does not divide into heads={self.heads} of even "
                "width."
            )
        return TitansMAC(self, d_model, rngs=rngs)


class State(NamedTuple):
    attention: segment_attention.State
    memory: tuple  # the state of its convolution, and weights, momentum and start of the kernel's
    phase: jax.Array  # [B] int32, which token of its segment comes next


class TitansMAC(Mixer):
    """h = norm(f_{W'}(x W_h));  a = attention([persistent | h | x]) inside the segment

    y = (norm(a) * sigmoid(norm(memory(a)))) W_out, where W' are the weights with which the segment
    began, and the memory is trained on a, and reads it. Read literally, the paper lets a token see
    what comes after it: here token i sees h_j for j <= i alone, and the memory of its own time.

    A segment needs the weights that the one before it left, so segments wait for each other, with
    all that is done in them: only inside do tokens run in parallel.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.recall = Linear(d_model, d_model, ("embed", "heads"), rngs=rngs)
        self.attention = SegmentAttention(c.heads, c.persistent, c.rope_base, d_model, rngs=rngs)
        self.memory = NeuralMemory(c.memory, d_model, rngs=rngs)
        norm = lambda: RMSNorm(d_model, eps=c.norm_eps)
        self.context_norm, self.attention_norm, self.memory_norm = norm(), norm(), norm()
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        conv, memory = self.memory.init_state(batch)
        attention = self.attention.init_state(batch, self.config.memory.chunk_size)
        return State(attention, (conv, *memory[:3]), jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        leaves, tree = jax.tree.flatten(self)
        y, (attention, memory), phase = scan_segments(
            _segment,
            tree,
            *(x, reset, leaves, state[:2], state.phase),
            chunk_size=self.config.memory.chunk_size,
        )
        return self.out(y), State(attention, memory, phase)

    def segment(self, x, reset, place, valid, state):
        """One window of `scan_segments`, all of whose tokens see weights of one start."""
        attention, memory = state
        context = self.memory.recall(self.recall(x), reset, place, valid, memory)
        a, attention = self.attention(x, self.context_norm(context), place, valid, attention)
        remembered, memory = self.memory.window(a, reset, place, valid, memory)
        gate = jax.nn.sigmoid(self.memory_norm(remembered))
        return self.attention_norm(a) * gate, (attention, memory)


def _segment(tree, tokens, reset, place, valid, leaves, state):
    y, state = jax.tree.unflatten(tree, leaves).segment(tokens[0], reset, place, valid, state)
    return widen(y), state
