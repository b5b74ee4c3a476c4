"""Configs as plain JSON and back, and dotted overrides; every mistake is one sentence.

A config is a frozen pydantic dataclass. What is stored is JSON; reading it validates every field
and refuses names it does not know, so loading a config never runs code.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from seqlab.errors import ConfigError, nearest

C = TypeVar("C")


def plain(config: Any) -> dict:
    """A config as JSON-ready dicts, lists and scalars."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def read(cls: type[C], fields: Mapping, where: str = "config") -> C:
    """The config that `plain` wrote; raises ConfigError naming the first field that is wrong."""
    try:
        config = TypeAdapter(cls).validate_python(dict(fields))
    except ValidationError as mistakes:
        raise ConfigError(sentence(mistakes, cls, where)) from None
    _refuse_unknown(fields, plain(config), where)
    return config


def override(config: C, assignments: Iterable[str], where: str = "override") -> C:
    """The config with `dotted.name=value` applied; values are JSON, or else plain text."""
    fields = plain(config)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{where} {assignment!r} is not of the form name=value.")
        _assign(fields, name.split("."), _value(text), name)
    return read(type(config), fields, where)


def sentence(mistakes: ValidationError, cls: type, where: str) -> str:
    """The first mistake of a pydantic report, in one sentence."""
    first = mistakes.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = getattr(cls, "__dataclass_fields__", {})
        return f"{where} has no field {name!r}: {nearest(name.split('.')[-1], known)}"
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "value_error":
        return f"{where}: {reason}."
    if first["type"] == "missing":
        return f"{where} lacks the field {name!r}: add it."
    return f"{where}: {name} = {first['input']!r} is wrong: {reason}."


def _assign(fields: Any, path: list[str], value: Any, name: str) -> None:
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(fields, list):
            if not part.isdigit() or int(part) >= len(fields):
                raise ConfigError(f"{name}: {part!r} is not an index below {len(fields)}.")
            key: Any = int(part)
        elif isinstance(fields, dict):
            if part not in fields:
                raise ConfigError(f"There is no field {name!r}: {nearest(part, fields)}")
            key = part
        else:
            raise ConfigError(
                f"There is no field {name!r}: {'.'.join(path[:depth])} has no fields."
            )
        if last:
            fields[key] = value
        else:
            fields = fields[key]


def _value(text: str) -> Any:
    python = {"None": None, "True": True, "False": False}
    try:
        return python[text] if text in python else json.loads(text)
    except json.JSONDecodeError:
        return text


def _refuse_unknown(given: Any, known: Any, where: str) -> None:
    """Every name in `given` must have been understood, that is, stand in what it was read as."""
    if isinstance(given, Mapping) and isinstance(known, Mapping):
        for name, value in given.items():
            if name not in known:
                raise ConfigError(f"{where} has no field {name!r}: {nearest(name, known)}")
            _refuse_unknown(value, known[name], f"{where}.{name}")
    elif isinstance(given, (list, tuple)) and isinstance(known, (list, tuple)):
        for i, (g, k) in enumerate(zip(given, known, strict=False)):
            _refuse_unknown(g, k, f"{where}.{i}")
