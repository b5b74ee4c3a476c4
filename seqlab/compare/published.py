"""What others measured, as data with its source: points to draw beside ours."""

import functools
import json
import pathlib
from typing import Literal, NamedTuple

_FILE = pathlib.Path(__file__).with_suffix(".json")


class Published(NamedTuple):
    """Accuracies by bytes of state, or by length; `setting` tells how it differs from others."""

    against: Literal["state", "length"]
    source: str
    setting: str
    curves: dict[str, list[tuple[float, float]]]


@functools.cache
def _file() -> dict:
    return json.loads(_FILE.read_text("utf-8"))


def points(task: str) -> list[Published]:
    """All that is known of a task."""
    return [Published(**group) for group in _file()["tasks"].get(task, ())]


#: The layer that stands first where a protocol says so, as `registry.from_plain` reads it.
FIRST: dict = _file()["first"]
