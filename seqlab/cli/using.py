"""Commands that use a model that is there."""

from typing import Annotated, Literal

import typer

from seqlab import heap
from seqlab.cli.options import MaxLength, MixerFiles, Overrides, Path, app, register
from seqlab.errors import ConfigError


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
    heap.keep()
    from seqlab.infer import command

    register(mixer)
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
    heap.keep()
    from seqlab.evaluate import command

    register(mixer)
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
