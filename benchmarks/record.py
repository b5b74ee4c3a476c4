"""What every benchmark does with its numbers: a table, a verdict on each claim, a JSON file."""

import pathlib
import shlex
import sys
from typing import Any, NamedTuple

from rich.console import Console

from seqlab.bench import record as figures

RESULTS = pathlib.Path(__file__).parent / "results"


class Claim(NamedTuple):
    """Something that must hold, and the number that shows whether it does."""

    says: str
    number: str
    holds: bool  # a Python bool: it goes to JSON


def record(name: str, rows: list[dict[str, Any]], claims: list[Claim]) -> int:
    """Print the rows and the claims, write results/NAME.json; 0 if every claim holds, else 1."""
    console = Console()
    console.print(figures.table(name, rows))
    for claim in claims:
        verdict = "[green]pass[/]" if claim.holds else "[red]FAIL[/]"
        console.print(f"{verdict}  {claim.says}: {claim.number}")
    script = pathlib.Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]])
    verdicts = [claim._asdict() for claim in claims]
    figures.save(RESULTS, name, figures.head(command) | {"rows": rows, "claims": verdicts})
    return 0 if all(claim.holds for claim in claims) else 1
