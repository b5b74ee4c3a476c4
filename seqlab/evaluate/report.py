"""The results of an evaluation as tables on a terminal."""

import itertools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `command.evaluate` found: a table a task, one of the texts, one of the harness."""
    for task, rows in itertools.groupby(found["tasks"], lambda row: row["task"]):
        console.print(_task(task, list(rows)))
    if found["texts"]:
        console.print(_texts(found["texts"]))
    if found["harness"]:
        console.print(_harness(found["harness"]))


def _task(task: str, rows: list[dict[str, Any]]) -> Table:
    """Settings that fill a grid of two fields as that grid, all others one to a row."""
    varied = _varied([row["fields"] for row in rows])
    if len(varied) == 2:
        down, across = varied
        grid = {(row["fields"][down], row["fields"][across]): row["accuracy"] for row in rows}
        lines, columns = (list(dict.fromkeys(key[i] for key in grid)) for i in (0, 1))
        if len(grid) == len(rows) == len(lines) * len(columns) > len(lines) > 1:
            return _grid(task, down, across, lines, columns, grid)
    table = _table(f"{task}: accuracy", "setting", "examples", "mean", "exact")
    for row in rows:
        numbers = f"{row['accuracy']:.3f}", f"{row['exact']:.3f}"
        table.add_row(row["label"] or "as it comes", f"{row['examples']:,}", *numbers)
    return table


def _grid(task: str, down: str, across: str, lines: list, columns: list, grid: dict) -> Table:
    heads = [f"{across} {_text(columns[0])}", *map(_text, columns[1:])]
    table = _table(f"{task}: mean accuracy", down, *heads)
    for line in lines:
        table.add_row(_text(line), *(f"{grid[line, column]:.3f}" for column in columns))
    return table


def _varied(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The fields in which the settings differ, in their order."""
    return [name for name in rows[0] if len({repr(row[name]) for row in rows}) > 1]


def _texts(rows: list[dict[str, Any]]) -> Table:
    table = _table("texts", "text", "tokens", "nats/token", "perplexity", "bits/byte", "right")
    for row in rows:
        numbers = (f"{row[name]:.4f}" for name in ("loss", "perplexity", "bits_per_byte"))
        table.add_row(row["text"], f"{row['tokens']:,}", *numbers, f"{row['accuracy']:.3f}")
    return table


def _harness(rows: list[dict[str, Any]]) -> Table:
    table = _table("lm-eval-harness", "task", "metric", "value", "error")
    for row in rows:
        error = row["error"]
        shown = "" if error is None else f"{error:.4f}"
        table.add_row(row["task"], row["metric"], f"{row['value']:.4f}", shown)
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    return table


def _text(value: Any) -> str:
    return "any" if value is None else str(value)
