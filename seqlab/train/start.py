"""Fine-tuning: the weights of a model that is there already, to begin a run with."""

from collections.abc import Mapping
from typing import Any

import jax

from seqlab.errors import ConfigError
from seqlab.models import store
from seqlab.models.parameters import parameters


def weights_of(path: str, like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The weights of a saved or published model, or of a run, by the names and shapes of `like`.

    Raises ConfigError where it has others, and what `store.load` raises.
    """
    found = parameters(store.load(path))
    shape = lambda arrays, name: list(arrays[name].shape) if name in arrays else "absent"
    for name in sorted({**like, **found}):
        there, here = shape(found, name), shape(like, name)
        if there != here:
            raise ConfigError(
                f"start={path}: its {name} is {there} and that of this run's model {here}: give "
                "this run the model that is there, or another start."
            )
    return found
