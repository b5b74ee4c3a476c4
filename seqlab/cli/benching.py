"""`seqlab bench`: one command a question."""

import shlex
import sys
from typing import Annotated

import typer

from seqlab.cli.options import Path, app

bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Measure: every figure beside another in the same run.")

Device = Annotated[str | None, typer.Option(help="cpu, gpu or tpu [the fastest that is here].")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that each thing takes; medians count.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The folder [benchmarks/results in a checkout, else runs/bench]."),
]
Sizes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=VALUE]...", help="Sizes; values joined by commas are all tried."),
]


@bench.command()
def kernels(
    family: Annotated[str, typer.Argument(help="Such as delta_rule, or all.")],
    sizes: Sizes = None,
    form: Annotated[
        list[str], typer.Option(help="Such as reference; repeatable [all but reference].")
    ] = [],  # noqa: B006
    device: Device = None,
    rounds: Rounds = 9,
    out: Out = None,
) -> None:
    """Time every form of a kernel family, against XLA's and against what the device can do.

    Sizes: B rows of T tokens, H heads, keys K and values V wide.
    """
    from seqlab.bench import command, machine

    machine.take(device)
    command.kernels(_command(), family, sizes or [], form, rounds, out)


def _command() -> str:
    """This command as it was given, but for the folder."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if word != "--out" or not next(words)]
    return shlex.join(["seqlab", *kept])
