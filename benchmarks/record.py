"""What every benchmark does with its numbers: a table, a verdict on each claim, a JSON file."""

import os
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import aims
from seqlab.bench import machine, timing
from seqlab.bench import record as figures
from seqlab.bench.timing import Work

WIDEST = 10_000  # columns of a terminal that has room for every table
RESULTS = pathlib.Path(__file__).parent / "results"


class Claim(NamedTuple):
    """Something that must hold, and the number that shows whether it does."""

    says: str
    number: str
    holds: bool  # a Python bool: it goes to JSON


def claim(row: dict[str, Any]) -> Claim:
    """That a race reached its aim."""
    name, which = row.get("what") or row["model"], row.get("pass", aims.TRAINING)
    measured = (
        "" if aims.reached(row) == row["ratio"] else " in CPU seconds, the machine being busy"
    )
    says = f"{name}, {which}: against {row['peer']}{measured}, at least {aims.aim(row):g}"
    return Claim(says, f"{aims.reached(row):.2f}", aims.holds(row))


def raced(
    name: str, peer: str, which: str, length: int, ours: Work, theirs: Work, rounds: int
) -> dict[str, Any]:
    """A row: the two in turns."""
    laps = timing.race({"ours": ours, "theirs": theirs}, rounds)
    row = {
        "what": name,
        "peer": peer,
        "pass": which,
        "tokens a row": length,
        "our ms": 1e3 * float(np.median(laps["ours"].seconds)),
        "their ms": 1e3 * float(np.median(laps["theirs"].seconds)),
        **timing.ratios(laps["theirs"], laps["ours"]),
        "cores": machine.cores(),
        "load": os.getloadavg()[0],
    }
    print(row, flush=True)
    return row


def record(name: str, rows: list[dict[str, Any]], claims: list[Claim]) -> int:
    """Print the rows and the claims, write results/NAME.json; 0 if every claim holds, else 1."""
    console = Console()
    console.print(_fitting(console, name, rows))
    for claim in claims:
        verdict = "[green]pass[/]" if claim.holds else "[red]FAIL[/]"
        console.print(f"{verdict}  {claim.says}: {claim.number}")
    script = pathlib.Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]])
    verdicts = [claim._asdict() for claim in claims]
    figures.save(RESULTS, name, figures.head(command) | {"rows": rows, "claims": verdicts})
    return 0 if all(claim.holds for claim in claims) else 1


def _fitting(console: Console, name: str, rows: list[dict[str, Any]]) -> Table:
    """The rows as columns where they are too wide."""
    table = figures.table(name, rows)
    if Console(width=WIDEST).measure(table).maximum <= console.width:
        return table
    first, *others = (key for key in rows[0] if not key.endswith(timing.SPREAD))
    return figures.table(
        name, [{first: key} | {str(row[first]): row[key] for row in rows} for key in others]
    )
