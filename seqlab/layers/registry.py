"""Mixers by name: the files of `seqlab/layers/mixers`, and those that a user brings.

A mixer file defines `Config`, a frozen dataclass with `build(d_model, rngs=)`. Its name is the name
of the file, in configs, on the command line and in checkpoints.
"""

import dataclasses
import importlib
import importlib.util
import pathlib
import pkgutil
import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from seqlab import settings
from seqlab.errors import ConfigError, nearest
from seqlab.layers import mixers as package

_brought: dict[str, type] = {}


def own_mixers() -> list[str]:
    """Names of seqlab's own mixers: the listing of their folder."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def mixers() -> list[str]:
    """Names of every mixer that can be built here: seqlab's own and those registered."""
    return sorted({*own_mixers(), *_brought})


def register_mixer(config_class: type, name: str | None = None) -> str:
    """Make a mixer of your own known by name (its file's, unless given), so that configs and
    checkpoints that speak of it can be read. Returns the name."""
    name = name or config_class.__module__.rpartition(".")[2]
    if _class(name) not in (None, config_class) and name not in _brought:
        raise ConfigError(f"The mixer name {name!r} is taken by seqlab: rename your file.")
    _brought[name] = config_class
    return name


def register_file(path: str | pathlib.Path) -> str:
    """Import a mixer file (this runs it) and register its `Config` under the file's name."""
    path = pathlib.Path(path).absolute()
    if not path.is_file():
        raise ConfigError(f"There is no mixer file {path}: give the path of a .py file.")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) != str(path):
        raise ConfigError(f"A module called {path.stem!r} is loaded already: rename {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"The mixer file {path} is not a Python file: give the path of a .py file."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise ConfigError(f"Importing {path} raised {settings.raised(error)}.") from error
    config_class = getattr(module, "Config", None)
    if not (dataclasses.is_dataclass(config_class) and hasattr(config_class, "build")):
        raise ConfigError(
            f"{path} defines no mixer: it needs a dataclass Config with a build method."
        )
    return register_mixer(module.Config, path.stem)


def mixer_config(name: str, /, **fields: Any) -> Any:
    """The Config of the mixer called `name`; raises ConfigError for an unknown name or field."""
    config_class = _class(name)
    if config_class is None:
        raise ConfigError(
            f"There is no mixer {name!r} (your own are given by --mixer FILE): "
            + nearest(name, mixers())
        )
    return settings.read(config_class, fields, where=name)


def mixer_name(config: Any) -> str:
    """The name under which `mixer_config` builds a config of this kind."""
    for name, config_class in _brought.items():
        if type(config) is config_class:
            return name
    name = type(config).__module__.rpartition(".")[2]
    return name if _class(name) is type(config) else register_mixer(type(config))


def _class(name: str) -> type | None:
    if name in _brought:
        return _brought[name]
    if name not in own_mixers():
        return None
    return importlib.import_module(f"{package.__name__}.{name}").Config


def from_plain(value: Any) -> Any:
    """A mixer's Config, from what `to_plain` wrote; a Config stays what it is."""
    if isinstance(value, Mapping):
        fields = {str(name): field for name, field in value.items()}
        name = fields.pop("mixer", None)
        if not isinstance(name, str):
            raise ConfigError(f"A mixer config names its mixer, for example gla, not {name!r}.")
        return mixer_config(name, **fields)
    if not hasattr(value, "build"):
        raise ValueError(f"{value!r} is not a mixer config: use seqlab.mixer_config(name)")
    return value


def to_plain(config: Any) -> dict:
    """`{"mixer": name, ...its fields}`, ready for JSON."""
    name, fields = mixer_name(config), settings.plain(config)
    if "mixer" in fields:
        raise ConfigError(f"{name}: 'mixer' names the mixer in every config: rename that field.")
    return {"mixer": name, **fields}


#: A mixer's Config as a field of another config: `{"mixer": name, ...its fields}` in JSON.
MixerConfig = Annotated[Any, PlainValidator(from_plain), PlainSerializer(to_plain)]
