"""How large the pieces of each GPU kernel are: a table, `blocks.json`, that no run ever changes.

A row says for which kind of device and which class of shapes it is ("any" is for those without a
row of their own), and whether it is the fastest of several that were timed there or a guess
(`measured`). `tuning` measures new rows.
"""

import functools
import json
import pathlib
from typing import NamedTuple

from seqlab.kernels.on_gpu import trust

TABLE = pathlib.Path(__file__).with_name("blocks.json")
ANY = "any"


class Blocks(NamedTuple):
    """`block` are the sizes that the kernel names; `stages` of a loop are under way at once."""

    block: tuple[int, ...]
    warps: int
    stages: int = 1


class Row(NamedTuple):
    kernel: str
    device: str
    shape: str
    block: tuple[int, ...]
    warps: int
    stages: int
    measured: bool

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.block, self.warps, self.stages)


@functools.cache
def table() -> dict[tuple[str, str, str], Row]:
    """Every row, by kernel, device and shape."""
    rows = [
        Row(**{**row, "block": tuple(row["block"])}) for row in json.loads(TABLE.read_text("utf-8"))
    ]
    return {row[:3]: row for row in rows}


def chosen(kernel: str, shape: str = ANY) -> Blocks:
    """What the table has for a kernel on the GPU here, or else on any; a row of this device comes
    before one of this class of shapes."""
    device = trust.gpu_kind() or ANY
    asked = [(kernel, d, s) for d in (device, ANY) for s in (shape, ANY)]
    return next(table()[row].blocks for row in asked if row in table())
