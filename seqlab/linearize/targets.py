"""What takes the place of a layer's attention: a preset, or any mixer, as wide as the attention."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from seqlab import settings
from seqlab.errors import ConfigError, nearest
from seqlab.layers import registry
from seqlab.linearize.presets import PRESETS


def known(word: str) -> str:
    """The name of a preset or a mixer; of a mixer file, which is imported, the name it then has.

    Raises ConfigError where there is none.
    """
    if word.endswith(".py"):
        return registry.register_file(pathlib.Path(word))
    names = {*PRESETS, *registry.mixers()}
    if word not in names:
        raise ConfigError(f"There is no mixer {word!r}: {nearest(word, names)}")
    return word


def target(name: str, fields: Sequence[str], d_model: int) -> Callable[[Any], Any]:
    """From the config of an attention, all its sizes in it, to that of what takes its place.

    fields  `name=value`, over what the preset has or what `like` gives
    """
    make = PRESETS.get(name) or (lambda attention: like(attention, name, d_model))
    return lambda attention: settings.override(make(attention), fields, name)


def like(attention: Any, name: str, d_model: int) -> Any:
    """The config of a mixer with as many heads as an attention, as wide: whatever it calls them."""
    default = registry.mixer_config(name)
    if type(default) is type(attention):
        return attention
    H, K = attention.heads, attention.head_dim
    wide = H * K / d_model
    sizes = {
        **dict.fromkeys(("heads", "key_heads", "value_heads", "groups"), H),
        **dict.fromkeys(("head_dim", "key_dim", "value_dim", "d_state"), K),
        **dict.fromkeys(("expand", "expand_k", "expand_v"), wide),
    }
    has = settings.plain(default)
    return registry.mixer_config(name, **{n: size for n, size in sizes.items() if n in has})
