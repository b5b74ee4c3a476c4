"""`--dry-run`: what a linearization would change, train and need, before any weight is read."""

import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from seqlab.layers.registry import mixer_name
from seqlab.linearize import facts, room
from seqlab.linearize.request import Request
from seqlab.models import layout
from seqlab.train import readable


def show(request: Request, known: facts.Facts, console: Console) -> None:
    """Print tables of what is known of a swap."""
    console.print(_changes(request, known))
    if request.stages:
        console.print(_stages(request, known))
    console.print(_needs(request, known))


def _changes(request: Request, known: facts.Facts) -> Table:
    table = _table("What changes", "layers", "")
    table.add_row(spans(known.replaced), f"attention becomes {request.mixer}")
    kept = [layer for layer in range(known.layers) if layer not in known.replaced]
    if kept:
        table.add_row(spans(kept), "stay as they are")
    return table


def _stages(request: Request, known: facts.Facts) -> Table:
    table = _table("What trains", "stage", "weights", "number", "tokens", "steps", "batch", "rate")
    for number, (stage, trained) in enumerate(zip(request.stages, known.trained, strict=True), 1):
        table.add_row(
            f"{number} {stage.loss}",
            stage.train,
            readable.count(trained),
            readable.count(stage.tokens),
            f"{stage.steps:,}",
            f"{stage.batch} x {stage.length:,}",
            f"{stage.lr:.3g}",
        )
    return table


def spans(layers: Iterable[int]) -> str:
    """Numbers with runs of them drawn together: 0-2, 4, 6-7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if at > 1 else "left")
    return table
