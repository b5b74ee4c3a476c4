"""Figures as they are kept: rows in a JSON file, with the machine and the command behind them."""

import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.table import Table

from seqlab.bench import machine
from seqlab.bench.timing import SPREAD
from seqlab.train.folder import put

RESULTS = pathlib.Path("benchmarks/results")  # of a checkout, from its root
ELSEWHERE = pathlib.Path("runs/bench")

LEFT_OUT = "left out"  # in a row without figures: why

Row = dict[str, Any]


def folder(out: pathlib.Path | None) -> pathlib.Path:
    """Where results go unless a folder is given."""
    return out or (RESULTS if RESULTS.is_dir() else ELSEWHERE)


def save(folder: pathlib.Path, name: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Write NAME.json whole; raises ConfigError where it cannot be written."""
    path = folder / f"{name}.json"
    put(path, json.dumps(content, indent=1) + "\n")
    return path


def head(command: str) -> dict[str, Any]:
    """What stands above the rows. Ask before measuring: the load is that of others then."""
    return {"command": command, "machine": machine.describe()}


def table(title: str, rows: Sequence[Row], hidden: Collection[str] = ()) -> Table:
    """The rows as a person reads them: behind a median, how far from it half of the rounds lie."""
    every = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in every if not name.endswith(SPREAD) and name not in hidden]
    drawn = Table(*names, title=title)
    for row in rows:
        drawn.add_row(*(_cell(row, name) for name in names))
    return drawn


def _cell(row: Row, name: str) -> str:
    median, quartiles = row.get(name), row.get(name + SPREAD)
    if median is None or quartiles is None or quartiles[0] == quartiles[1]:
        return shown(median)
    return f"{shown(median)} ±{(quartiles[1] - quartiles[0]) / median / 2:.0%}"


def shown(value: Any) -> str:
    """A number with as many digits as a person reads; nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
