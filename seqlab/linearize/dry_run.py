"""`--dry-run`: what a linearization would change, train and need, before any weight is read."""

from rich import box
from rich.console import Console
from rich.table import Table

from seqlab.linearize.estimate import Estimate
from seqlab.linearize.request import Request
from seqlab.train import readable


def show(request: Request, found: Estimate, console: Console, *, exports: bool = False) -> None:
    """Print what an estimate found, of a linearization that exports its student or does not."""
    console.print(_changes(request, found))
    if request.stages:
        console.print(_stages(request, found))
    console.print(_needs(found, exports))


def _changes(request: Request, found: Estimate) -> Table:
    table = _table("What changes", "layers", "")
    table.add_row(readable.spans(found.replaced), f"attention becomes {request.mixer}")
    if kept := set(range(found.layers)) - set(found.replaced):
        table.add_row(readable.spans(kept), "stay as they are")
    if found.left:
        names = sorted({name.partition(".mixer.")[2] for name in found.left})
        table.add_row("", f"without attention's {', '.join(names)}, which find no place")
    return table


def _needs(found: Estimate, exports: bool) -> Table:
    size, disk = readable.size, found.disk_bytes + exports * found.student_bytes
    table = _table("What it comes to", "", "")
    for name, value in (
        ("parameters of the teacher", f"{found.parameters:,}"),
        ("parameters added", f"{found.added:,}"),
        ("state of a sequence, in these layers", size(found.state_bytes)),
        ("KV cache that it replaces, per token", size(found.cache_bytes)),
        ("so the state is smaller from", f"{found.break_even:,} tokens on"),
        ("memory, without activations", size(found.memory_bytes)),
        ("disk, " + ("with the export" if exports else "without an export"), size(disk)),
    ):
        table.add_row(name, value)
    return table


def _stages(request: Request, found: Estimate) -> Table:
    table = _table("What trains", "stage", "weights", "number", "tokens", "steps", "batch", "rate")
    for number, (stage, trained) in enumerate(zip(request.stages, found.trained, strict=True), 1):
        table.add_row(
            f"{number} {stage.loss}",
            stage.train,
            readable.count(trained),
            readable.count(stage.predicted),
            f"{stage.steps:,}",
            f"{stage.batch} x {stage.length:,}",
            f"{stage.lr:.3g}",
        )
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if at > 1 else "left")
    return table
