"""What a person sees of a comparison: a table that lives on a terminal, elsewhere lines."""

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seqlab.compare.results import Result
from seqlab.train import readable

COLUMNS = ("mixer", "parameters", "state", "step", "loss", "accuracy", "seconds")


class Board:
    """A row an entry; also a context manager. On a terminal it is drawn anew as training goes on;
    elsewhere each entry is a line when it is finished, without control codes."""

    def __init__(self, names: Sequence[str], console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._rows: dict[str, dict[str, str]] = {name: {} for name in names}
        self._began = 0.0
        show = self._console.is_interactive
        self._live = Live(get_renderable=self.table, console=self._console) if show else None

    def start(self, name: str, result: Result) -> None:
        self._began = time.monotonic()
        self._rows[name] = _sizes(result) | {"step": "compiling"}

    def say(self, name: str, step: int, steps: int, loss: float, accuracy: float | None) -> None:
        row = self._rows[name]
        row |= {"step": f"{step:,}/{steps:,}", "loss": _number(loss)}
        row["seconds"] = f"{time.monotonic() - self._began:,.0f}"
        if accuracy is not None:
            row["accuracy"] = _number(accuracy)

    def finish(self, name: str, result: Result, again: bool) -> None:
        """Show what came out; `again` for what was there before."""
        self._rows[name] = row = _sizes(result) | _outcome(result)
        if self._live is None:
            kept = "  (kept)" if again else ""
            shown = "  ".join(f"{column} {row[column]}" for column in COLUMNS[1:])
            self.note(f"{name:<24}  {shown}{kept}")

    def note(self, text: str) -> None:
        """A line of its own: above the table where there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def table(self) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "mixer" else "right")
        for name, row in self._rows.items():
            cells = [row.get(column, "") for column in COLUMNS[1:]]
            bad = "red" if row.get("loss") == "diverged" else ""
            table.add_row(Text(name), *(Text(cell, bad) for cell in cells))
        return table

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()


def _sizes(result: Result) -> dict[str, str]:
    sizes = readable.count(result.parameters), readable.size(result.state_bytes)
    return dict(zip(("parameters", "state"), sizes, strict=True))


def _outcome(result: Result) -> dict[str, str]:
    best = result.best[0]
    diverged = best.diverged is not None
    return {
        "step": f"{best.diverged if diverged else best.steps:,}",
        "loss": "diverged" if diverged else _number(best.loss),
        "accuracy": _number(result.accuracy),
        "seconds": f"{sum(run.seconds for run in result.runs):,.0f}",
    }


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"
