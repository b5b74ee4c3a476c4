"""Sizes as the command line gives them: NAME=VALUE, several values joined by commas."""

import itertools
from collections.abc import Iterable
from typing import TypeVar

from seqlab import settings

S = TypeVar("S")


def combinations(plain: S, fields: Iterable[str], where: str) -> list[S]:
    """`plain` with every combination of the values of "T=1024,4096" and other fields; raises
    ConfigError for a field or a value that is wrong."""
    parts = [field.partition("=") for field in fields]
    ways = [[f"{name}{equals}{one}" for one in text.split(",")] for name, equals, text in parts]
    return [settings.override(plain, chosen, where) for chosen in itertools.product(*ways)]
