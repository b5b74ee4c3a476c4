"""`seqlab linearize`: a pretrained transformer becomes a model whose memory does not grow."""

import pathlib

from rich.console import Console

from seqlab.linearize import dry_run, pipeline, report
from seqlab.linearize.checks import checked
from seqlab.linearize.request import Request


def run(
    request: Request,
    out: pathlib.Path,
    *,
    to: pathlib.Path | None = None,
    dry: bool = False,
    console: Console | None = None,
) -> None:
    """Linearize, or with `dry` only say what that would do; prints tables."""
    console = console or Console(highlight=False)
    if dry:
        dry_run.show(request, checked(request, to), console)
        return
    record = pipeline.linearize(request, out, to=to, say=console.print)
    console.print(report.table(record))
    console.print(f"The student is in {out}, its report in {out / 'report.html'}")
