"""Commands that make a model, and what it is made from."""

import sys
from typing import Annotated, Literal

import typer

from seqlab import heap
from seqlab.cli.options import MaxLength, MixerFiles, Overrides, Path, app, many_option, register
from seqlab.launch import go_on_in_a_child, several_are_meant


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A Python file that defines `config`.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; runs/ and the config's name by default.")
    ] = None,
    mixer: MixerFiles = [],  # noqa: B006 (typer reads it)
    coordinator: Annotated[
        str | None, many_option(metavar="HOST:PORT", help="Where process 0 is.")
    ] = None,
    processes: Annotated[int | None, many_option(min=1, help="How many.")] = None,
    process_id: Annotated[int | None, many_option(help="This one's, from 0.")] = None,
    distributed: Annotated[
        Literal["auto", "on", "off"], many_option(help="Join what a scheduler started.")
    ] = "auto",
    join: Annotated[float, many_option(help="Seconds to wait for the others.")] = 300,
    heartbeat: Annotated[
        float, many_option(min=1, help="Seconds without a sign of life of one that is gone.")
    ] = 10,
    stall: Annotated[
        float, many_option(min=1, help="Seconds without progress that end a run.")
    ] = 60,
) -> None:
    """Train a model, or go on with a run; leaves checkpoints, metrics, samples and a report."""
    if (
        (processes or 1) > 1
        or distributed == "on"
        or (distributed == "auto" and several_are_meant())
    ):
        go_on_in_a_child()
    heap.keep()
    from seqlab.parallel import processes as many

    with many.ending_at_once():
        many.start(
            coordinator,
            processes,
            process_id,
            distributed=distributed,
            join=join,
            heartbeat=heartbeat,
        )
        from seqlab import experiment
        from seqlab.train.config import load
        from seqlab.train.watchdog import Limits

        register(mixer)
        folder = out or Path("runs") / config.stem
        wanted = many.alike(lambda: load(config, overrides))
        experiment.run(wanted, folder, limits=Limits(heartbeat, stall))


@app.command()
def linearize(
    model: Annotated[Path, typer.Argument(help="A published or a saved model, or a run.")],
    method: Annotated[str, typer.Option(help="liger, lizard, lolcats, hedgehog, radlads, ...")],
    data: Annotated[
        list[str], typer.Option(help="A text or .jsonl file, a pattern, token shards; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the student, its stages and report.")],
    overrides: Overrides = None,
    mixer: Annotated[
        str | None, typer.Option(help="Instead of the method's: a mixer's name, or a file.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="0,5", help="Layers to leave as they are, from 0.")
    ] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Leave every N-th layer.")] = None,
    held_out: Annotated[
        list[str], typer.Option(help="What to evaluate with; repeatable [a share of --data].")
    ] = [],  # noqa: B006
    share: Annotated[float, typer.Option(help="Of the documents of --data, held out.")] = 0.05,
    jsonl_field: Annotated[str, typer.Option(help="The text in JSON lines.")] = "text",
    max_length: MaxLength = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a published model here as well.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Turn a pretrained transformer into a model with constant memory, and say what it lost.

    NAME=VALUE are fields of the stages and the run (stages.0.tokens=200000, mesh.data=2), and of
    the new mixer (window=32).
    """
    heap.keep()
    from seqlab.linearize import command, request

    asked = request.ask(
        model,
        method,
        data,
        mixer=mixer,
        held_out=held_out,
        share=share,
        field=jsonl_field,
        keep=keep,
        keep_every=keep_every,
        max_length=max_length,
        overrides=overrides or [],
    )
    command.run(asked, out, to=export, dry=dry_run)


@app.command()
def tokenize(
    files: Annotated[list[str], typer.Argument(help="Text files or patterns.")],
    out: Annotated[str, typer.Option(help="Where the token shards go: a folder or a URL.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or a tokenizer.json.")] = "bytes",
    jsonl_field: Annotated[
        str | None, typer.Option(help="The files are JSON lines; take this field.")
    ] = None,
) -> None:
    """Write token shards (zarr, through tensorstore) that training reads row by row."""
    from rich.console import Console

    from seqlab.train import tokenize as shards

    console = Console(stderr=True)
    with console.status("tokenizing") as status:
        show = lambda now: status.update(f"tokenizing: {now.documents:,} documents")
        done = shards.tokenize(files, out, tokenizer, field=jsonl_field, on_progress=show)
    for note in done.notes:
        print(note, file=sys.stderr)
    print(f"{out}: {done.documents:,} documents, {done.tokens:,} tokens, {done.bytes:,} bytes")
