"""The command line: one entry point, `seqlab`. Bad input is one sentence and a non-zero status."""

import contextlib
import functools
import os
import pathlib
import sys
import warnings
from typing import Annotated, Literal

import typer

from seqlab import heap
from seqlab.errors import ConfigError, SeqlabError
from seqlab.launch import go_on_in_a_child, several_are_meant

app = typer.Typer(
    name="seqlab",
    help="New sequence architectures in JAX: train, generate, and prove that all forms agree.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Path = pathlib.Path
MixerFiles = Annotated[
    list[Path], typer.Option("--mixer", help="A mixer file of your own (it is run); repeatable.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Fields to override, dotted.")
]
many_option = functools.partial(typer.Option, rich_help_panel="Many processes")
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that a published model's full attention holds [<= 4096]."),
]


def main() -> None:
    """Run a command; errors of the user's input become one line and their exit status."""
    warnings.showwarning = lambda message, *_: print(f"seqlab: {message}", file=sys.stderr)
    try:
        app()
    except SeqlabError as error:
        print(f"seqlab: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


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

        _register(mixer)
        folder = out or Path("runs") / config.stem
        wanted = many.alike(lambda: load(config, overrides))
        experiment.run(wanted, folder, limits=Limits(heartbeat, stall))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A run folder, a saved or a published model.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A file to continue; - is standard input.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Tokens to add.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop below p times the likeliest.")] = None,
    seed: int = 0,
    batch: Annotated[int, typer.Option(help="Continuations, drawn independently.")] = 1,
    stop: Annotated[str | None, typer.Option(help="End a text at this string.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the session here.")] = None,
    state: Annotated[Path | None, typer.Option(help="Go on from a saved session.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a row.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = (
        False
    ),
    system: Annotated[str | None, typer.Option(help="A system message before a --chat.")] = None,
    read_twice: Annotated[
        bool, typer.Option("--read-twice", help="Give the prompt twice, or as a prefix needs it.")
    ] = False,
    max_length: MaxLength = None,
    mixer: MixerFiles = [],  # noqa: B006
) -> None:
    """Continue a text, streaming, in memory that does not grow."""
    from seqlab.infer import command

    _register(mixer)
    status = command.generate(
        model,
        prompt=prompt,
        prompt_file=prompt_file,
        steps=steps,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        batch=batch,
        stop=stop,
        save_state=save_state,
        state=state,
        as_json=json,
        chat=chat,
        system=system,
        read_twice=read_twice,
        max_length=max_length,
    )
    raise typer.Exit(status)


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


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A model's folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    fields: Overrides = None,
    max_length: MaxLength = None,
    pack: Annotated[
        Literal["ternary", "int8", "ptqtp"] | None,
        typer.Option(help="Write a saved model with weights of few bits, for inference."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text that --pack int8 reads.")
    ] = None,
    squeeze: Annotated[
        bool, typer.Option("--squeeze", help="Store five trits a byte, not four.")
    ] = False,
) -> None:
    """Write a published model as a saved one, and a run or saved model as a published one.

    A published model is what transformers reads and writes: config.json and safetensors. With
    --pack, whatever the source, DST is a saved model; NAME=VALUE are fields of that form.
    """
    from seqlab.models import convert

    if pack is None and (fields or calibrate or squeeze):
        raise ConfigError("Fields, --calibrate and --squeeze are for --pack: give that as well.")
    if pack is None:
        print(convert.convert(source, target, max_length=max_length))
    else:
        how = {"calibrate": calibrate, "squeeze": squeeze, "max_length": max_length}
        print(convert.packed(source, target, pack, fields or (), **how))


@app.command(name="eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder, a saved or a published model.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK[:PROTOCOL]] [FIELD=VALUE,...]...",
            help="Tasks, each with its fields behind it; values joined by commas are all tried.",
        ),
    ] = None,
    text: Annotated[
        list[str], typer.Option(help="A text file or pattern, for perplexity; repeatable.")
    ] = [],  # noqa: B006
    tokens: Annotated[
        list[str], typer.Option(help="Token shards, for perplexity; repeatable.")
    ] = [],  # noqa: B006
    examples: Annotated[
        int | None, typer.Option(min=1, help="Of every setting [256, or as its protocol says].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the examples.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Examples or documents side by side.")] = 32,
    window: Annotated[
        int | None, typer.Option(min=1, help="Cut texts every so many tokens, as training does.")
    ] = None,
    read_twice: Annotated[
        bool, typer.Option("--read-twice", help="Context and question of an example, twice.")
    ] = False,
    harness: Annotated[
        list[str], typer.Option(help="A task of lm-eval-harness (the extra eval); repeatable.")
    ] = [],  # noqa: B006
    include: Annotated[
        Path | None, typer.Option(help="A folder of task files of your own for --harness.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object to this file.")] = None,
    max_length: MaxLength = None,
    mixer: MixerFiles = [],  # noqa: B006
) -> None:
    """Score a model: accuracy on tasks that tell memories apart, perplexity of texts."""
    from seqlab.evaluate import command

    _register(mixer)
    command.run(
        model,
        words or [],
        text=text,
        tokens=tokens,
        examples=examples,
        seed=seed,
        batch=batch,
        window=window,
        read_twice=read_twice,
        harness=harness,
        include=include,
        as_json=json,
        out=out,
        max_length=max_length,
    )


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
    _register(mixer)
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

    _register(mixer)
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


def _register(files: list[Path]) -> None:
    if files:
        from seqlab.layers.registry import register_file

        for file in files:
            register_file(file)
