"""What the linear maps of a model are, by kind, and how one takes the place of another.

A layer is written with `Linear`, whatever a model makes of it: when the model is built, every
`Linear` within that is a projection is replaced by the kind that its config names. So a new kind
serves every layer there is, and a new layer every kind.

A kind's Config has `replace(linear, path)`, which returns the module that stands in the place of
the one at a path such as "0.ffn.down", and `head`: whether a model's untied head is replaced as
well. Kinds that do not train, but are packed from others, have the others' name as `trained_as` (it
is None for those that train), and `quantized(weight, path)`, which makes their arrays.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from flax import nnx
from pydantic import PlainSerializer, PlainValidator
from pydantic.dataclasses import dataclass

from seqlab import settings
from seqlab.errors import ConfigError, nearest
from seqlab.layers import bit_linear, int8_linear, ptqtp_linear, ternary_linear
from seqlab.layers.linear import Linear
from seqlab.settings import STRICT

NARROW = 16  # a side so many times shorter than the other makes a map a gate, not a projection


@dataclass(frozen=True, config=STRICT)
class Dense:
    """Linear maps as they are."""

    trained_as: ClassVar[None] = None
    head: bool = False

    def replace(self, linear: Linear, path: str) -> nnx.Module:
        return linear


KINDS = {
    "dense": Dense,
    "bit": bit_linear.Config,
    "ternary": ternary_linear.Config,
    "int8": int8_linear.Config,
    "ptqtp": ptqtp_linear.Config,
}


def kind(config: Any) -> str:
    """The name of a kind's Config in KINDS."""
    for name, config_class in KINDS.items():
        if type(config) is config_class:
            return name
    raise ConfigError(f"{config!r} is of no kind known here: use one of {', '.join(KINDS)}.")


def check_trains(config: Any) -> None:
    """Raises ConfigError for a kind that is packed for inference."""
    if config.trained_as is not None:
        raise ConfigError(
            f"Weights packed as linear={kind(config)!r} cannot be trained: train with "
            f"linear={config.trained_as!r}, and pack the result (seqlab convert --pack)."
        )


def is_projection(module: nnx.Module) -> bool:
    """Whether a module is a linear map between wide spaces, which alone are replaced.

    What is left as it is feeds steps, gates, choices and bottlenecks, costs little and is the first
    to suffer from rounding: maps with an axis that has no name (down to a rank or a router's
    experts, and up again), and maps with a side 16 times shorter than the other (a number a head).
    So is what is no `Linear`: the stacked experts of a mixture, maps of each head for itself.
    """
    if type(module) is not Linear:
        return False
    shape = module.weight.shape
    return None not in module.weight.axes and NARROW * min(shape) > max(shape)


def replace(
    module: nnx.Module,
    where: Callable[[nnx.Module], bool],
    make: Callable[[Any, str], nnx.Module],
) -> None:
    """Put `make(part, path)` in the place of every part of a module that `where` accepts."""
    found = [(path, part) for path, part in nnx.iter_modules(module) if path and where(part)]
    for path, part in found:
        parent: Any = functools.reduce(_inner, path[:-1], module)
        made = make(part, ".".join(map(str, path)))
        if isinstance(path[-1], int):
            parent[path[-1]] = made
        else:
            setattr(parent, str(path[-1]), made)


def _inner(module: Any, name: Any) -> Any:
    return module[name] if isinstance(name, int) else getattr(module, name)


def _from_plain(value: Any) -> Any:
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        if not hasattr(value, "replace"):
            raise ValueError(f"{value!r} is no kind of linear map: use a name, such as 'bit'")
        return value
    fields = {str(name): field for name, field in value.items()}
    name = fields.pop("kind", None)
    if name not in KINDS:
        raise ConfigError(f"There is no linear {name!r}: {nearest(str(name), KINDS)}")
    return settings.read(KINDS[name], fields, where="linear")


def _to_plain(config: Any) -> dict:
    return {"kind": kind(config), **settings.plain(config)}


#: A kind of linear map as a field: its name, or `{"kind": name, ...its fields}` as in JSON.
LinearConfig = Annotated[Any, PlainValidator(_from_plain), PlainSerializer(_to_plain)]
