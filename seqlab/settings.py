"""Configs as plain JSON and back, and dotted overrides; every mistake is one sentence.

A config is a frozen pydantic dataclass. What is stored is JSON; reading it validates every field
and refuses names it does not know, so loading a config never runs code.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from seqlab.errors import ConfigError, nearest

C = TypeVar("C")

#: `@dataclass(frozen=True, config=STRICT)`: pydantic would ignore a misspelt field by default.
STRICT = ConfigDict(extra="forbid")

#: The type of a field: a number above 0, neither infinite nor NaN.
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]

#: The same, or 0.
NonNegativeFinite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def plain(config: Any) -> dict:
    """A config as JSON-ready dicts, lists and scalars."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def read(cls: type[C], fields: Mapping, where: str = "config") -> C:
    """The config that `plain` wrote; raises ConfigError naming the first field that is wrong."""
    try:  # unknown names are left to `_refuse_unknown`, which sees the names beside them
        config = TypeAdapter(cls).validate_python(dict(fields), extra="ignore")
    except ValidationError as mistakes:
        raise ConfigError(_sentence(mistakes, where, fields)) from None
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


def raised(error: Exception) -> str:
    """What a user's own file raised, in one line: a clause that ends without a full stop."""
    if isinstance(error, ValidationError):
        return _sentence(error, error.title).rstrip(".")
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _sentence(mistakes: ValidationError, where: str, given: Any = None) -> str:
    """The first mistake of a pydantic report, in one sentence."""
    first = mistakes.errors()[0]
    name = _dotted(first["loc"], given)
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "unexpected_keyword_argument":
        return f"{where} has no field {name!r}: check its spelling."
    if first["type"] in ("missing", "missing_argument"):
        return f"{where} lacks the field {name!r}: add it."
    if first["type"] == "value_error":
        return f"{where}: {reason}."
    return f"{where}: {name} = {first['input']!r} is wrong: {reason}."


def _dotted(path: tuple, given: Any) -> str:
    """A path as overrides write it: without the tags that pydantic adds for unions."""
    names = []
    for part in path:
        if isinstance(given, Mapping) and part not in given and part in given.values():
            continue
        names.append(str(part))
        inside = isinstance(given, (Mapping, list, tuple))
        given = given[part] if inside and _has(given, part) else None
    return ".".join(names)


def _has(fields: Any, part: Any) -> bool:
    if isinstance(fields, Mapping):
        return part in fields
    return isinstance(part, int) and part < len(fields)


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
    except (ValueError, RecursionError):  # a digit string or a nesting too long is text as well
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
