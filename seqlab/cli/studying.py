"""Commands that study mixers, runs that are only planned, and this machine."""

import contextlib
from typing import Annotated

import typer

from seqlab import heap
from seqlab.cli.options import MixerFiles, Overrides, Path, app, register


@app.command()
def check(
    mixer: Annotated[str, typer.Argument(help="A mixer's name, or a file that defines one.")],
    fields: Overrides = None,
    d_model: int = 32,
) -> None:
    """Hold a mixer to the contract: one row a property, with its verdict and worst error."""
    import jax
    from rich.console import Console

    from seqlab.conformance import suite

    with contextlib.suppress(RuntimeError):  # JAX has started: take the devices it has
        jax.config.update("jax_num_cpu_devices", 8)  # so that sharding can be tried anywhere
    config = suite.load_mixer(mixer, fields or [])
    with Console(stderr=True).status(f"{mixer}: compiling") as status:
        show = lambda row: status.update(f"{mixer}: {row.property} done")
        report = suite.check(config, d_model=d_model, on_row=show)
    Console().print(report.table())
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A Python file that defines `config`.")],
    topology: Annotated[str, typer.Option(help="Such as v5p:4x4x4; for GPUs, h100:64.")],
    overrides: Overrides = None,
    strategy: Annotated[str | None, typer.Option(help="Instead of mesh.strategy.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    mixer: MixerFiles = [],  # noqa: B006
) -> None:
    """Plan a run on machines one does not have: memory, communication, speed; exit 1: no fit.

    For TPUs its programs are compiled, on a machine without one; for GPUs it is arithmetic.
    """
    import jax

    from seqlab.plan.command import plan
    from seqlab.train.config import load

    jax.config.update("jax_platforms", "cpu")  # whatever is here stays free
    register(mixer)
    raise typer.Exit(0 if plan(load(config, overrides), topology, strategy, json) else 1)


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help="Such as mqar.")],
    mixers: Annotated[str, typer.Option(help="'a,b(heads=2),c(d_state=8)', or all.")],
    protocol: Annotated[str, typer.Option(help="Of the task: ci, or a published one.")] = "ci",
    budget: Annotated[
        str | None,
        typer.Option(help="'600 steps', '2M tokens' or '90s'; the protocol's by default."),
    ] = None,
    lr: Annotated[str | None, typer.Option(help="1e-3,1e-2: the best one counts.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at each rate; means count.")] = 1,
    width: Annotated[str | None, typer.Option(help="64,128: each mixer at each.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder; runs/ and the task's name by default.")
    ] = None,
    mixer: MixerFiles = [],  # noqa: B006
) -> None:
    """Train mixers on a task under one protocol; leaves a page of accuracy by state and length."""
    heap.keep()
    from seqlab.compare import command

    register(mixer)
    asked = command.ask(
        task,
        mixers,
        out=out or Path("runs") / f"compare_{task}",
        protocol_name=protocol,
        budget=budget,
        lr=lr,
        seeds=seeds,
        width=width,
    )
    command.compare(asked)


@app.command()
def doctor() -> None:
    """Show devices, versions, and which implementation each kernel takes here."""
    import rich

    from seqlab import doctor as report

    rich.print(report.machine())
    rich.print(report.implementations())
    rich.print(report.gpu_kernels())
