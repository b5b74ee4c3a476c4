"""A language model is a mixer over tokens: the same contract, the same law, one level up."""

import functools
import json
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import BeforeValidator, PlainSerializer
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.kept import KEPT
from seqlab.kernels.precision import widen
from seqlab.kernels.soft_cap import soft_cap
from seqlab.layers import auxiliary, linear_kinds
from seqlab.layers import ffn as channel_mixer
from seqlab.layers import norm as norms
from seqlab.layers.channel_mixer import ChannelMixerConfig
from seqlab.layers.linear import Linear, product
from seqlab.layers.linear_kinds import LinearConfig
from seqlab.layers.mixer import State
from seqlab.models import block as blocks
from seqlab.models import narrow
from seqlab.models.block import BlockConfig, Join
from seqlab.parallel.mesh import DATA, SEQ, constrain
from seqlab.parallel.sequence import ENTERING
from seqlab.settings import STRICT, PositiveFinite

#: What a period of the pattern recomputes in the backward pass: nothing, all but products,
#: kernels and states from other devices, all.
Remat = Literal["none", "cheap", "all"]
_POLICIES = {
    "cheap": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT, ENTERING),
    ),
    "all": jax.checkpoint_policies.nothing_saveable,
}

#: A JSON object as a field that can be hashed: text in here, an object in files.
Published = Annotated[
    str,
    BeforeValidator(lambda value: value if isinstance(value, str) else json.dumps(value)),
    PlainSerializer(json.loads),
]


@dataclass(frozen=True, config=STRICT)
class Config:
    """A model of `len(pattern) * repeats` blocks, and of those `before` and `after` them.

    A block is given as a mixer's config, which takes the model's `ffn` and `join`, or as a whole
    `block.Config`. Only the pattern is scanned over depth: what compiles is one period of it, and
    each block before and after.

    `linear` is the kind of linear map that every projection of every block is, whatever layer it is
    in (see `linear_kinds`): "dense", or "bit" for weights -1, 0, 1 and eight-bit activations.

    Embeddings are multiplied by `embed_scale`, where "root" is the root of d_model, rounded as they
    are (Gemma); then normed if `embed_norm` says how. Logits are multiplied by `logit_scale`, then
    bent below `logit_cap` by a tanh if there is one. `head_bias` adds a bias to them, in a head
    that is not tied.

    `published` is the config.json of the published checkpoint that the model was read from, and
    that it is exported as.

    `unroll` periods stand in the program one after another before it loops: more to compile, less
    to copy.

    dtype "auto" computes in float32 on a CPU and in bfloat16 on an accelerator; weights, states,
    gates and logits are float32 in any case.
    """

    vocab: int
    d_model: int
    pattern: tuple[BlockConfig, ...]
    repeats: int = 1
    ffn: ChannelMixerConfig | None = channel_mixer.Config()
    tie_embeddings: bool = True
    remat: Remat = "cheap"
    unroll: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    before: tuple[BlockConfig, ...] = ()
    after: tuple[BlockConfig, ...] = ()
    join: Join = Join()
    norm: norms.Config = norms.Config()
    linear: LinearConfig = linear_kinds.Dense()
    embed_scale: PositiveFinite | Literal["root"] = 1.0
    embed_norm: norms.Config | None = None
    logit_scale: PositiveFinite = 1.0
    logit_cap: PositiveFinite | None = None
    head_bias: bool = False
    published: Published | None = None

    def __post_init__(self):
        for name in ("vocab", "d_model", "repeats", "unroll"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, not {getattr(self, name)}.")
        if not self.pattern:
            raise ConfigError("model.pattern must hold at least one mixer config.")
        if self.head_bias and self.tie_embeddings:
            raise ConfigError("model.head_bias is of a head of its own: set tie_embeddings=False.")

    def build(self, *, rngs: nnx.Rngs) -> "LM":
        return LM(self, rngs=rngs)

    def skeleton(self) -> "LM":
        """The model without its numbers: every weight a ShapeDtypeStruct."""
        return jax.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))

    def block(self, entry: Any) -> blocks.Config:
        """An entry of before, pattern or after as a whole block."""
        if isinstance(entry, blocks.Config):
            return entry
        return blocks.Config(mixer=entry, ffn=self.ffn, join=self.join)


class LM(nnx.Module):
    """Embedding, blocks of which the pattern is scanned `repeats` times, a norm, logits.

    The state is a tuple with one BlockState per block before, of the pattern, and after, in this
    order, whose leaves carry the repeats in front: [repeats, B, ...], [1, B, ...] off the pattern.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Linear(c.vocab, c.d_model, ("vocab", "embed"), std=c.d_model**-0.5, rngs=rngs)
        self.embed_norm = c.embed_norm.build(c.d_model) if c.embed_norm else None
        self.before = self._built(c.before, rngs)
        period = lambda key: self._built(c.pattern, nnx.Rngs(key))
        self.blocks = jax.vmap(period)(jax.random.split(rngs.params(), c.repeats))
        self.after = self._built(c.after, rngs)
        self.norm = c.norm.build(c.d_model)
        head = lambda: Linear(c.d_model, c.vocab, ("embed", "vocab"), bias=c.head_bias, rngs=rngs)
        head_kind = c.linear if c.linear.head else linear_kinds.Dense()
        self.head = None if c.tie_embeddings else head_kind.replace(head(), "head")

    def _built(self, entries, rngs: nnx.Rngs) -> nnx.List:
        c = self.config
        blocks = nnx.List([c.block(entry).build(c.d_model, rngs=rngs) for entry in entries])
        linear_kinds.replace(blocks, linear_kinds.is_projection, c.linear.replace)
        return blocks

    @property
    def max_length(self) -> int | None:
        """Longest document the model can hold in its state; None is no limit."""
        limits = self._of_layers("max_length", None)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def prefix(self) -> int:
        """So many tokens at the start of a document see one another and come in one call."""
        return max(self._of_layers("prefix", 0))

    def _of_layers(self, name: str, default: Any) -> list:
        every = (*self.before, *self.blocks, *self.after)
        return [getattr(layer, name, default) for b in every for layer in b.layers]

    def init_state(self, batch: int) -> State:
        """The empty state for `batch` rows."""
        return _empty(self, batch)

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

        x = self._embed(tokens)
        shares = any(block.shares for block in (*self.before, *self.blocks, *self.after))
        stream, n, m = (x, x if shares else None), len(self.before), len(self.blocks)

        def period(stream, xs):
            blocks, states, *at = xs  # a place in the stacks, if their weights are narrow
            blocks = narrow.period(blocks, self.blocks, at[0], self.dtype) if at else blocks
            return self._period(stream, blocks, states, reset)

        if self.config.remat != "none":
            period = jax.checkpoint(period, policy=_POLICIES[self.config.remat])
        stream, before = _unstacked(period, stream, self.before, state[:n])
        stacks = jax.tree.leaves(self.blocks)
        some = any(narrow.is_narrow(a, self.dtype) for a in stacks)
        at = (jnp.arange(len(stacks[0])),) if some else ()
        blocks = (self.blocks, state[n : n + m], *at)
        stream, (middle, found) = _over_depth(period, stream, blocks, self.config)
        auxiliary.include(found)
        (x, _), after = _unstacked(period, stream, self.after, state[n + m :])
        return self.norm(x), (*before, *middle, *after)

    def _embed(self, tokens):
        weight, scale = self.embed.weight[...], self.config.embed_scale
        x = narrow.read(lambda w, ids: w[ids], weight, tokens, self.dtype).astype(self.dtype)
        if scale == "root":
            scale = float(np.asarray(self.config.d_model**0.5, weight.dtype))
        x = x if scale == 1.0 else x * scale
        x = x if self.embed_norm is None else self.embed_norm(x)
        return constrain(x, DATA, SEQ, None)

    def _period(self, stream, blocks, states, reset):
        (x, shared), after = stream, []
        with auxiliary.collect_inside() as found:
            for block, state in zip(blocks, states, strict=True):
                x, state, shared = block(x, state, reset, shared)
                after.append(state)
        return (constrain(x, DATA, SEQ, None), shared), (tuple(after), found)

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden vectors [..., D] -> logits [..., vocab] float32."""
        c = self.config
        if self.head is not None and not isinstance(self.head, Linear):
            logits = self.head(widen(x))
        else:
            weight = self.embed.weight[...].T if self.head is None else self.head.weight[...]
            logits = product(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
            bias = None if self.head is None else self.head.bias
            logits = logits if bias is None else logits + bias[...]
        logits = logits if c.logit_scale == 1.0 else logits * c.logit_scale
        return soft_cap(logits, c.logit_cap)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and of the operands of products."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


# op by op, every weight would be cut out of its stack, by a program of its own
@functools.partial(jax.jit, static_argnums=1)
def _empty(model: LM, batch: int) -> State:
    first = jax.tree.map(lambda a: a[0], model.blocks)
    stacked = lambda n, b: jax.tree.map(
        lambda a: jnp.broadcast_to(a, (n, *a.shape)), b.init_state(batch)
    )
    return (
        *(stacked(1, block) for block in model.before),
        *(stacked(model.config.repeats, block) for block in first),
        *(stacked(1, block) for block in model.after),
    )


def _unstacked(period, stream, blocks, states):
    """Blocks off the pattern, one by one; their states have one repeat."""
    after = []
    for block, state in zip(blocks, states, strict=True):
        one = jax.tree.map(lambda a: a[0], state)
        stream, ((one,), found) = period(stream, ([block], (one,)))
        auxiliary.include(found)
        after.append(jax.tree.map(lambda a: a[None], one))
    return stream, tuple(after)


def _over_depth(period, stream, stacks, config: Config):
    """`lax.scan` over the periods, or one by one where the config unrolls them all: then what they
    keep for the backward pass is not stacked, which on a CPU saves a tenth of a step."""
    if config.unroll < config.repeats:
        return jax.lax.scan(period, stream, stacks, unroll=config.unroll)
    leaves, tree = jax.tree.flatten(stacks)
    ones = (1,) * len(leaves[0])  # decoding has one period after the other as patterns of one
    after = []
    for parts in zip(*(jax.lax.split(leaf, ones) for leaf in leaves), strict=True):
        stream, ys = period(stream, tree.unflatten([part[0] for part in parts]))
        after.append(ys)
    return stream, jax.tree.map(lambda *ys: jnp.stack(ys), *after)
