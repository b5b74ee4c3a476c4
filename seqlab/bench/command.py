"""The questions of `seqlab bench`: measure, print, and leave a JSON file and pictures."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.status import Status

from seqlab.bench import kernels as of_kernels
from seqlab.bench import machine, pictures, record
from seqlab.bench.ceilings import ceilings
from seqlab.bench.record import Row
from seqlab.errors import ConfigError

FILE_WIDTH = 140  # of a table that goes to a file
Say = Callable[[str], None]
#: What a table has no room for; it is in the file.
HIDDEN = {
    *("family", "variant", *"BTHKV", "bytes", "operations", "GB/s", "GFLOP/s"),
    *("copy bytes", "copy GB/s", "product", "product GFLOP/s"),
}


def kernels(
    command: str,
    family: str,
    sizes: Sequence[str],
    forms: Sequence[str],
    rounds: int,
    out: pathlib.Path | None,
) -> list[Row]:
    """Every form and pass of a family, at every size; raises ConfigError for what is not known."""
    cases, shapes = of_kernels.cases(family), of_kernels.shapes(sizes)
    for case in cases:
        of_kernels.forms(case, forms)

    def rows(say: Say) -> list[Row]:
        top, found = ceilings(), []
        for case in cases:
            for shape in shapes:
                say(f"{case.family}, {case.variant}")
                found += of_kernels.measure(case, shape, forms, rounds, top)
        return found

    return _answer(command, f"kernels_{family}", rows, pictures.kernels, out)


def _answer(
    command: str,
    name: str,
    measure: Callable[[Say], list[Row]],
    draw: Callable[..., Any],
    out: pathlib.Path | None,
) -> list[Row]:
    """Measure, print a table, write NAME_DEVICE.json and its pictures; raises ConfigError where
    nothing could be measured."""
    head, folder, name = record.head(command), record.folder(out), f"{name}_{machine.name()}"
    with Console(stderr=True).status(name) as status:
        rows = measure(lambda text: _say(status, name, text))
    measured = [row for row in rows if record.LEFT_OUT not in row]
    if not measured:
        raise ConfigError(f"Nothing was measured: {rows[0][record.LEFT_OUT].rstrip('.')}.")
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(record.table(name, rows, HIDDEN))
    path = record.save(folder, name, head | {"rows": rows})
    draw(folder, name, measured)
    console.print(f"{path}, {path.with_suffix('.png')}")
    return rows


def _say(status: Status, name: str, text: str) -> None:
    status.update(f"{name}: {text}")
