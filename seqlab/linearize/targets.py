"""What takes the place of a layer's attention: a preset, or any mixer, as wide as the attention."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from seqlab import settings
from seqlab.errors import ConfigError, nearest
from seqlab.layers import registry
from seqlab.linearize.fit import fit
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

    fields  `name=value`, over what the preset has or what `fit` gives
    """
    make = PRESETS.get(name) or (lambda attention: fit(name, attention, d_model))
    return lambda attention: settings.override(make(attention), fields, name)
