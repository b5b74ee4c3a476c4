"""`seqlab linearize`: a pretrained transformer becomes a model whose memory does not grow."""

import pathlib

from rich.console import Console

from seqlab.errors import ConfigError
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
    if to is not None and to.absolute() == out.absolute():
        raise ConfigError(f"--out and --export are both {out}: give the export another folder.")
    if dry:
        dry_run.show(request, checked(request, to), console, exports=to is not None)
        return
    record = pipeline.linearize(request, out, to=to, say=console.print)
    console.print(report.table(record))
    console.print(f"The student is in {out}, its report in {out / 'report.html'}")
