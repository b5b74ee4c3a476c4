"""A language model is a mixer over tokens: the same contract, the same law, one level up."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.layers import ffn as channel_mixer
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import State
from seqlab.layers.norm import RMSNorm
from seqlab.layers.registry import MixerConfig
from seqlab.parallel.mesh import DATA, SEQ, constrain
from seqlab.settings import STRICT

#: What a period of the pattern recomputes in the backward pass: nothing, all but products, all.
Remat = Literal["none", "cheap", "all"]
_POLICIES = {
    "cheap": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True, config=STRICT)
class Config:
    """A model of `len(pattern) * repeats` blocks; `pattern` holds one mixer config per block.

    dtype "auto" computes in float32 on a CPU and in bfloat16 on an accelerator; weights, states,
    gates and logits are float32 in any case.
    """

    vocab: int
    d_model: int
    pattern: tuple[MixerConfig, ...]
    repeats: int = 1
    ffn: channel_mixer.Config | None = channel_mixer.Config()
    tie_embeddings: bool = True
    remat: Remat = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        for name in ("vocab", "d_model", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, not {getattr(self, name)}.")
        if not self.pattern:
            raise ConfigError("model.pattern must hold at least one mixer config.")

    def build(self, *, rngs: nnx.Rngs) -> "LM":
        return LM(self, rngs=rngs)

    def skeleton(self) -> "LM":
        """The model without its numbers: every weight a ShapeDtypeStruct."""
        return jax.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) unless there is no ffn."""

    def __init__(self, config: Config, mixer, *, rngs: nnx.Rngs):
        d = config.d_model
        self.mixer_norm, self.mixer = RMSNorm(d), mixer.build(d, rngs=rngs)
        self.ffn_norm = RMSNorm(d) if config.ffn else None
        self.ffn = config.ffn.build(d, rngs=rngs) if config.ffn else None

    def __call__(self, x, state, reset):
        y, state = self.mixer(self.mixer_norm(x), state, reset=reset)
        x += y
        if self.ffn is not None and self.ffn_norm is not None:
            x += self.ffn(self.ffn_norm(x))
        return x, state


class LM(nnx.Module):
    """Embedding, the pattern of blocks scanned `repeats` times, a norm, logits.

    The state is a tuple with one mixer state per block of the pattern, whose leaves carry the
    repeats in front: [repeats, B, ...].
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Linear(c.vocab, c.d_model, ("vocab", "embed"), std=c.d_model**-0.5, rngs=rngs)

        def period(key):
            rngs = nnx.Rngs(key)
            return nnx.List([Block(c, mixer, rngs=rngs) for mixer in c.pattern])

        self.blocks = jax.vmap(period)(jax.random.split(rngs.params(), c.repeats))
        self.norm = RMSNorm(c.d_model)
        tied = c.tie_embeddings
        self.head = None if tied else Linear(c.d_model, c.vocab, ("embed", "vocab"), rngs=rngs)

    @property
    def max_length(self) -> int | None:
        """Longest document the model can hold in its state; None is no limit."""
        limits = [b.mixer.max_length for b in self.blocks if b.mixer.max_length is not None]
        return min(limits, default=None)

    def init_state(self, batch: int) -> State:
        """The empty state for `batch` rows."""
        c = self.config
        first = jax.tree.map(lambda a: a[0], self.blocks)
        one = tuple(block.mixer.init_state(batch) for block in first)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (c.repeats, *a.shape)), one)

    def __call__(self, tokens: jax.Array, state: State = None, *, reset=None):
        """tokens [B, T] int, reset [B, T] bool -> logits [B, T, vocab] float32, state.

        `state` None is the empty state; `reset` None is no document start (an empty state needs
        none). Any T >= 1: feeding a text in pieces gives what feeding it at once gives.

        Call it under `jax.jit` (a model is a pytree, so pass it as an argument): outside, the scan
        over depth is compiled anew at every call.
        """
        x, state = self.hidden(tokens, state, reset=reset)
        return self.logits(x), state

    def hidden(self, tokens: jax.Array, state: State = None, *, reset=None):
        """The same up to the last norm: tokens [B, T] -> [B, T, D] in the compute dtype, state."""
        if state is None:
            state = self.init_state(tokens.shape[0])
        if reset is None:
            reset = jnp.zeros(tokens.shape, bool)

        def period(x, blocks_and_states):
            states = []
            for block, state in zip(*blocks_and_states, strict=True):
                x, state = block(x, state, reset)
                states.append(state)
            return constrain(x, DATA, SEQ, None), tuple(states)

        if self.config.remat != "none":
            period = jax.checkpoint(period, policy=_POLICIES[self.config.remat])
        x = constrain(self.embed.weight[...][tokens].astype(self.dtype), DATA, SEQ, None)
        x, state = jax.lax.scan(period, x, (self.blocks, state))
        return self.norm(x), state

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden vectors [..., D] -> logits [..., vocab] float32."""
        if self.head is None:
            weight = self.embed.weight[...].T
        else:
            weight = self.head.weight[...]
        return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and of the operands of products."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
