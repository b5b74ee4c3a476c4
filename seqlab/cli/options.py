"""The application that every command is registered with, and the options that several share."""

import functools
import pathlib
from typing import Annotated

import typer

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


def register(files: list[Path]) -> None:
    """Make mixers of these files known by name."""
    if files:
        from seqlab.layers.registry import register_file

        for file in files:
            register_file(file)
