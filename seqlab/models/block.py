"""A block: layers that read the residual stream through norms and add to it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
from flax import nnx
from pydantic import PlainSerializer, PlainValidator
from pydantic.dataclasses import dataclass

from seqlab import settings
from seqlab.errors import ConfigError
from seqlab.layers import norm as norms
from seqlab.layers import registry
from seqlab.layers.channel_mixer import ChannelMixerConfig
from seqlab.layers.mixer import Mixer, State
from seqlab.layers.registry import MixerConfig
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Join:
    """How a layer joins the residual stream x: keep * x + scale * layer(norm(x)).

    `place` "after" norms what the layer returns instead (OLMo), "both" does both (Gemma 2), "none"
    leaves norms to the layer. With `on_normed`, what is kept is norm(x), not x (MiniMax).
    """

    norm: norms.Config = norms.Config()
    place: Literal["before", "after", "both", "none"] = "before"
    on_normed: bool = False
    keep: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True, config=STRICT)
class Config:
    """A mixer, then a channel mixer; either may be absent.

    `beside` is a second mixer that reads what the first reads, and adds to its output (Falcon-H1);
    `gain` and `beside_gain` multiply what enters and what leaves each. `ffn_join` None is `join`.

    In `parallel`, the channel mixer reads the residual stream where the mixer does, so that neither
    waits for the other: through a norm of its own (GPT-NeoX), or through the mixer's (Phi).
    """

    mixer: MixerConfig | None = None
    ffn: ChannelMixerConfig | None = None
    beside: MixerConfig | None = None
    gain: tuple[float, float] = (1.0, 1.0)
    beside_gain: tuple[float, float] = (1.0, 1.0)
    join: Join = Join()
    ffn_join: Join | None = None
    parallel: Literal["own_norm", "one_norm"] | None = None

    def __post_init__(self):
        if self.mixer is None and (self.ffn is None or self.beside is not None):
            raise ConfigError("A block needs a mixer, or an ffn alone: give it one.")
        usual = self.ffn_join is None and self.join == Join(norm=self.join.norm)
        if self.parallel and not (self.mixer and self.ffn and usual):
            raise ConfigError(
                f"parallel={self.parallel!r} is of a mixer and an ffn, joined in the usual way: "
                "give both, and of join the norm alone."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Block":
        return Block(self, d_model, rngs=rngs)


class BlockState(NamedTuple):
    """The states of a block's layers; None for a layer that is absent, or has none."""

    mixer: State
    beside: State
    ffn: State


class Block(nnx.Module):
    """x, then x + mixer(norm(x)), then x + ffn(norm(x)), joined as the config says."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, d = config, d_model
        self.config = c
        self.mixer_norm, self.mixer_post_norm = _norms(c.join, d) if c.mixer else (None, None)
        self.mixer = c.mixer.build(d, rngs=rngs) if c.mixer else None
        self.beside = c.beside.build(d, rngs=rngs) if c.beside else None
        own = c.ffn and c.parallel != "one_norm"
        self.ffn_norm, self.ffn_post_norm = _norms(c.ffn_join or c.join, d) if own else (None, None)
        self.ffn = c.ffn.build(d, rngs=rngs) if c.ffn else None

    @property
    def layers(self) -> tuple:
        """The layers of a BlockState, in its order."""
        return self.mixer, self.beside, self.ffn

    @property
    def shares(self) -> bool:
        """Whether something must travel beside the residual stream for this block."""
        return any(isinstance(layer, Mixer) and layer.shares for layer in self.layers)

    def init_state(self, batch: int) -> BlockState:
        """The empty state for `batch` rows."""
        empty = lambda layer: layer.init_state(batch) if isinstance(layer, Mixer) else None
        return BlockState(*map(empty, self.layers))

    def __call__(self, x, state: BlockState, reset, shared=None):
        """x [B, T, D], state, reset [B, T], shared [B, T, D] or None -> x, state, shared"""
        c, (mixed, beside, channels) = self.config, state
        start = read = x
        if self.mixer is not None:
            read = _read(c.join, self.mixer_norm, x)
            y, mixed, shared = _run(self.mixer, read, mixed, reset, shared, c.gain)
            if self.beside is not None:
                z, beside, shared = _run(self.beside, read, beside, reset, shared, c.beside_gain)
                y += z
            x = _add(c.join, self.mixer_norm, self.mixer_post_norm, x, read, y)
        if self.ffn is not None:
            join = c.ffn_join or c.join
            if c.parallel != "one_norm":
                read = _read(join, self.ffn_norm, start if c.parallel else x)
            y, channels, shared = _run(self.ffn, read, channels, reset, shared)
            x = _add(join, self.ffn_norm, self.ffn_post_norm, x, read, y)
        return x, BlockState(mixed, beside, channels), shared


def _norms(join: Join, d: int):
    first = None if join.place == "none" else join.norm.build(d)
    return first, join.norm.build(d) if join.place == "both" else None


def _read(join: Join, norm, x: jax.Array) -> jax.Array:
    """What a layer reads of the residual stream."""
    return x if join.place in ("after", "none") else norm(x)


def _add(join: Join, norm, post_norm, x: jax.Array, read: jax.Array, y: jax.Array) -> jax.Array:
    """The residual stream x after a layer that read `read` and returned `y`."""
    if join.place == "after":
        y = norm(y)
    elif post_norm is not None:
        y = post_norm(y)
    return _times(read if join.on_normed else x, join.keep) + _times(y, join.scale)


def _run(layer, x, state, reset, shared, gain=(1.0, 1.0)):
    """Any layer of a block, with or without a state: y, its state, shared."""
    x = _times(x, gain[0])
    if not isinstance(layer, Mixer):
        y = layer(x)
    elif layer.shares:
        y, state, shared = layer.mix(x, state, reset, shared)
    else:
        y, state = layer(x, state, reset=reset)
    return _times(y, gain[1]), state, shared


def _times(x: jax.Array, gain: float) -> jax.Array:
    return x if gain == 1.0 else x * gain


def _from_plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("mixer"), Mapping | None):
        return settings.read(Config, value, where="block")
    return registry.from_plain(value)


def _to_plain(value: Any) -> dict:
    return settings.plain(value) if isinstance(value, Config) else registry.to_plain(value)


#: An entry of a model's pattern: a block, or a mixer's Config, which takes the model's own ffn.
BlockConfig = Annotated[Any, PlainValidator(_from_plain), PlainSerializer(_to_plain)]
