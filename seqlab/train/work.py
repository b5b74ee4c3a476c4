"""What a run trains: all weights of its model for its objective, or a part of them for a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from seqlab.models.parameters import parameters
from seqlab.train.data import Loader
from seqlab.train.step import Loss, cross_entropy


@dataclass(frozen=True)
class Work:
    """What `train` trains, and towards what.

    model       whatever the losses are asked of, without its numbers: an LM, or a tuple of them
    trained     the weights of it that train, by name, as they begin; they train in float32 or more,
                as copies, and checkpoints hold them alone; None: all of them, as the config says
    frozen      its other weights: an argument of the compiled step, never donated, in their dtype
    loss        (model, Asked) -> Loss, to be made small
    evaluation  the same for what is held out, in nats per token
    in_nats     whether `loss` is in nats per token too
    name        shown with the progress
    record      what config.json says of it, as JSON
    check       of the data, before the first step; raises DataError
    """

    model: Any
    trained: Mapping[str, jax.Array] | None = None
    frozen: Mapping[str, jax.Array] = field(default_factory=dict)
    loss: Callable[[Any, Any], Loss] = cross_entropy
    evaluation: Callable[[Any, Any], Loss] = cross_entropy
    in_nats: bool = True
    name: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Loader], None] = lambda loader: None

    @property
    def names(self) -> list[str]:
        """Of the weights that train."""
        return list(parameters(self.model) if self.trained is None else self.trained)

    def placed(self, place: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
        """The frozen weights where `place` says: what lies there already is not copied, and one
        array under several names stays one."""
        moved: dict[tuple, jax.Array] = {}
        for name, array in self.frozen.items():
            key = id(array), place[name]
            if key not in moved:
                moved[key] = jax.device_put(array, place[name])
        return {name: moved[id(a), place[name]] for name, a in self.frozen.items()}
