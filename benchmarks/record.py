"""What every benchmark does with its numbers: a table, a verdict on each claim, a JSON file."""

import json
import os
import pathlib
import platform
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / "results"


class Claim(NamedTuple):
    """Something that must hold, and the number that shows whether it does."""

    says: str
    number: str
    holds: bool  # a Python bool: it goes to JSON


def record(name: str, rows: list[dict[str, Any]], claims: list[Claim]) -> int:
    """Print the rows and the claims, write results/NAME.json; 0 if every claim holds, else 1."""
    console = Console()
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*map(_shown, row.values()))
    console.print(table)
    for claim in claims:
        verdict = "[green]pass[/]" if claim.holds else "[red]FAIL[/]"
        console.print(f"{verdict}  {claim.says}: {claim.number}")
    RESULTS.mkdir(exist_ok=True)
    verdicts = [claim._asdict() for claim in claims]
    content = json.dumps({"machine": machine(), "rows": rows, "claims": verdicts}, indent=2)
    (RESULTS / f"{name}.json").write_text(content + "\n")
    return 0 if all(claim.holds for claim in claims) else 1


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    device = jax.devices()[0]
    return {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def memory(field: str) -> int:
    """Bytes of this process: field "VmRSS" now, "VmHWM" at most so far (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
