"""A plan as JSON, and as tables on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from seqlab.models.summary import parameter_count
from seqlab.plan.estimate import FORMULA, Estimate
from seqlab.plan.programs import Memory
from seqlab.plan.topology import GiB, Topology
from seqlab.train.config import Config

_CATEGORIES = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "inputs": "other arguments (batch, states)",
    "outputs": "outputs of their own",
    "temporaries": "gradients, activations, other temporaries",
    "code": "code",
}


def head(config: Config, there: Topology) -> dict[str, Any]:
    """What is planned, and where."""
    m = config.mesh
    return {
        "topology": there.name,
        "devices": there.count,
        "device": {
            "memory": there.device.memory,
            "flops": there.device.flops,
            "bandwidth": there.device.bandwidth,
        },
        "mesh": {"data": m.data, "seq": m.seq, "model": m.model, "strategy": m.strategy},
        "parameters": parameter_count(config.model.skeleton()),
        "tokens_per_step": config.data.batch * config.data.length,
    }


def plain(e: Estimate) -> dict[str, Any]:
    """One program: bytes on a device, seconds, collectives by kind."""
    p = e.program
    return {
        "program": p.name,
        "tokens": p.tokens,
        "fits": e.fits,
        "needed": p.needed,
        "memory": p.memory and p.memory._asdict(),
        "collectives": list(e.traffic),
        "work": e.work,
        "products_at_peak": e.products or None,
        "exposed": e.exposed,
        "seconds": e.seconds,
        "tokens_per_second": e.tokens_per_second,
        "mfu": e.mfu,
        "compile_seconds": p.compile_seconds,
    }


def show(plan: dict[str, Any], console: Console) -> None:
    """Tables of memory, collectives and times, and sentences on what they mean."""
    mesh = plan["mesh"]
    axes = " x ".join(f"{axis}={mesh[axis]}" for axis in ("data", "seq", "model"))
    console.print(
        f"{plan['parameters'] / 1e9:.2f}B parameters, {plan['tokens_per_step']:,} tokens a step on "
        f"{plan['topology']}: {plan['devices']} devices, {axes}, {mesh['strategy']}",
        highlight=False,
    )
    if "programs" in plan:
        for table in (_memory(plan), _collectives(plan), _times(plan)):
            console.print(table)
        notes = [FORMULA]
    else:
        console.print(_analytic(plan))
        notes = [plan["note"]]
    for line in [*notes, *plan["advice"]]:
        console.print(line, highlight=False)
    verdict = "The run fits." if plan["fits"] else "The run does not fit."
    console.print(verdict, style="green" if plan["fits"] else "red")


def _memory(plan: dict[str, Any]) -> Table:
    capacity = plan["device"]["memory"]
    programs = plan["programs"]
    rows = _table("GiB a device", programs)
    for field in Memory._fields:
        cells = [_gib(p["memory"][field]) if p["memory"] else "-" for p in programs]
        rows.add_row(_CATEGORIES[field], *cells)
    rows.add_section()
    rows.add_row("all", *(_gib(p["needed"]) for p in programs))
    fits = lambda p: "yes" if p["fits"] else "[red]no"
    rows.add_row(f"fits {capacity / GiB:.1f} GiB", *map(fits, programs))
    return rows


def _collectives(plan: dict[str, Any]) -> Table:
    rows = Table(title="collectives, of the scheduled program", title_justify="left")
    rows.add_column("program")
    rows.add_column("kind")
    for name in ("run", "of them overlapped", "GB a device sends", "ms exposed"):
        rows.add_column(name, justify="right")
    for p in plan["programs"]:
        for c in p["collectives"]:
            counts = f"{c['count']:,}", f"{c['overlapped']:,}"
            times = f"{c['sent'] / 1e9:.4g}", f"{1e3 * c['exposed']:.4g}"
            rows.add_row(p["program"], c["kind"], *counts, *times)
    return rows


def _times(plan: dict[str, Any]) -> Table:
    rows = _table("times", plan["programs"])
    for label, field, scale, form in (
        ("work, ms", "work", 1e3, ",.4g"),
        ("products at the peak, ms", "products_at_peak", 1e3, ",.4g"),
        ("exposed communication, ms", "exposed", 1e3, ",.4g"),
        ("time, ms", "seconds", 1e3, ",.4g"),
        ("tokens a second", "tokens_per_second", 1, ",.0f"),
        ("MFU, %", "mfu", 100, ".1f"),
        ("compiling took, s", "compile_seconds", 1, ".0f"),
    ):
        cells = [
            "-" if p[field] is None else format(scale * p[field], form) for p in plan["programs"]
        ]
        rows.add_row(label, *cells)
    return rows


def _analytic(plan: dict[str, Any]) -> Table:
    rows = Table(title="train step, estimated", title_justify="left")
    rows.add_column("a device")
    rows.add_column("", justify="right")
    for name, size in plan["memory"].items():
        rows.add_row(f"{name}, GiB", _gib(size))
    rows.add_row(f"fits {plan['device']['memory'] / GiB:.1f} GiB", "yes" if plan["fits"] else "no")
    rows.add_section()
    for name, seconds in plan["times"].items():
        rows.add_row(f"{name}, ms", f"{1e3 * seconds:,.4g}")
    rows.add_row("tokens a second", f"{plan['tokens_per_second']:,.0f}")
    rows.add_row("MFU, %", f"{100 * plan['mfu']:.1f}")
    return rows


def _table(title: str, programs: list[dict]) -> Table:
    rows = Table(title=title, title_justify="left")
    rows.add_column("")
    for p in programs:
        rows.add_column(p["program"], justify="right")
    return rows


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}"
