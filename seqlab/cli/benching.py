"""`seqlab bench`: one command a question."""

import shlex
import sys
from typing import Annotated

import typer

from seqlab import heap
from seqlab.cli.options import MixerFiles, Path, app, register

bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Measure: every figure beside another in the same run.")

Device = Annotated[str | None, typer.Option(help="cpu, gpu or tpu [the fastest that is here].")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that each thing takes; medians count.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The folder [benchmarks/results in a checkout, else runs/bench]."),
]
Mixers = Annotated[str, typer.Option(help="'a,b(heads=2)', or all.")]
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
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure the block sizes of a GPU's kernels instead.")
    ] = False,
    device: Device = None,
    rounds: Rounds = 9,
    out: Out = None,
) -> None:
    """Time every form of a kernel family, against XLA's and against what the device can do.

    Sizes: B rows of T tokens, H heads, keys K and values V wide. With --tune, the table of block
    sizes is printed as it is with what was measured here.
    """
    from seqlab.bench import command, machine

    machine.take(device)
    if tune:
        from seqlab.kernels.on_gpu import __main__ as tuning

        return tuning.main([] if family == "all" else [family])
    command.answer(command.kernels(family, sizes or [], form), _command(), rounds, out)


@bench.command()
def train(
    sizes: Sizes = None,
    mixers: Annotated[str | None, typer.Option(help="'a,b(heads=2)', or all.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A Python file that defines `config`: its own model.")
    ] = None,
    device: Device = None,
    rounds: Rounds = 5,
    out: Out = None,
    mixer: MixerFiles = [],  # noqa: B006
) -> None:
    """Time a training step of mixers, against softmax attention in a model of equal size.

    Sizes: B rows of T tokens, L layers of width D.
    """
    heap.keep()
    from seqlab.bench import command, machine

    machine.take(device)
    register(mixer)
    command.answer(command.train(mixers, config, sizes or []), _command(), rounds, out)


@bench.command()
def prefill(
    mixers: Mixers,
    sizes: Sizes = None,
    device: Device = None,
    rounds: Rounds = 5,
    out: Out = None,
    mixer: MixerFiles = [],  # noqa: B006
) -> None:
    """Time the reading of prompts, against softmax attention in a model of equal size.

    Sizes: B rows of T tokens, L layers of width D; C tokens are read at once.
    """
    from seqlab.bench import command, machine

    machine.take(device)
    register(mixer)
    command.answer(command.prefill(mixers, sizes or []), _command(), rounds, out)


@bench.command()
def decode(
    mixers: Mixers,
    sizes: Sizes = None,
    device: Device = None,
    rounds: Rounds = 5,
    out: Out = None,
    mixer: MixerFiles = [],  # noqa: B006
) -> None:
    """Time a step of decoding, against softmax attention and against reading weights and states.

    Sizes: B rows after T tokens, L layers of width D. Contexts that do not fit the memory are left
    out.
    """
    from seqlab.bench import command, machine

    machine.take(device)
    register(mixer)
    command.answer(command.decode(mixers, sizes or []), _command(), rounds, out)


def _command() -> str:
    """This command as it was given, but for the folder."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if not (word == "--out" and next(words))]
    kept = [word for word in kept if not word.startswith("--out=")]
    return shlex.join(["seqlab", *kept])
