"""The long-term memory of Titans alone (Behrouz, Zhong & Mirrokni, 2024): a network that learns,
while it reads a document, which values belong to which keys.

The paper's persistent tokens, learned and in front of every document, would change only what the
memory starts with, which is learned already: they are left to the variants with attention.
"""

import jax
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.layers import neural_memory
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.neural_memory import NeuralMemory, State
from seqlab.layers.norm import RMSNorm
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config(neural_memory.Config):
    """The fields of `neural_memory.Config`; norm_eps is that of the norm of the output."""

    norm_eps: PositiveFinite = 1e-6

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "TitansLMM":
        return TitansLMM(self, d_model, rngs=rngs)


class TitansLMM(Mixer):
    """S_t = eta_t S_{t-1} - theta_t grad |f_{W'}(k_t) - v_t|^2;  W_t = (1 - alpha_t) W_{t-1} + S_t

    y_t = (norm(f_{W_t}(q_t)) * silu(x_t W_gate)) W_out, where f is a perceptron for each head and
    W' its weights before the chunk; q, k, v and the gates as in `NeuralMemory`.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.memory = NeuralMemory(config, d_model, rngs=rngs)
        self.gate = Linear(d_model, d_model, ("embed", "heads"), rngs=rngs)
        self.norm = RMSNorm(d_model // config.heads, eps=config.norm_eps)
        self.out = Linear(d_model, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        return self.memory.init_state(batch)

    def mix(self, x, state: State, reset):
        y, state = self.memory(x, state, reset)
        y = merge(self.norm(heads(y, self.memory.config.heads)))
        return self.out(y * jax.nn.silu(self.gate(x))), state
