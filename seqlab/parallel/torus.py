"""Where devices are, on machines that are wired as a torus, and how to lay a sequence on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def laid(devices: Sequence[Any], data: int, seq: int, model: int) -> np.ndarray:
    """Devices [data, seq, model], consecutive ones along seq one link apart (see `snake`).

    Every other line runs the other way, so that where lines are whole rows of the torus, devices
    with the same place in neighbouring lines are neighbours too.
    """
    lines = np.empty(data * model * seq, object)
    lines[:] = snake(devices)[: lines.size]
    lines = lines.reshape(data * model, seq)
    lines[1::2] = lines[1::2, ::-1].copy()
    return lines.reshape(data, model, seq).swapaxes(1, 2)


def snake(devices: Sequence[Any]) -> list[Any]:
    """The devices row by row, there and back, so that consecutive ones are one link apart and none
    of the links that close the torus is needed.

    Cores of one chip follow each other, and so do slices, which no link joins. Devices that do not
    say where they are (CPUs and GPUs have no `coords`) keep their order.
    """
    if not all(located(device) for device in devices):
        return list(devices)
    at = {_place(device): device for device in devices}
    axes = [sorted(set(axis)) for axis in zip(*at, strict=True)]
    return [at[place] for place in _path(axes) if place in at]


def located(device: Any) -> bool:
    """Whether a device says where on a torus it is."""
    return getattr(device, "coords", None) is not None


def _place(device) -> tuple[int, ...]:
    slice_number = getattr(device, "slice_index", None) or 0
    return slice_number, *reversed(device.coords), getattr(device, "core_on_chip", None) or 0


def _path(axes: list[list[int]]) -> list[tuple[int, ...]]:
    if not axes:
        return [()]
    layer = _path(axes[1:])
    return [
        (i, *place) for n, i in enumerate(axes[0]) for place in (layer[::-1] if n % 2 else layer)
    ]
