"""The questions of `seqlab bench`: measure, print, and leave a JSON file and pictures."""

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from rich.console import Console

from seqlab.bench import kernels as of_kernels
from seqlab.bench import machine, models, pictures, reading, record
from seqlab.bench import training as of_training
from seqlab.bench.ceilings import Ceilings, ceilings
from seqlab.bench.models import Entry
from seqlab.bench.record import Row
from seqlab.errors import ConfigError
from seqlab.train import config as runs

Measure = Callable[[int, Ceilings], list[Row]]  # of rounds

FILE_WIDTH = 140  # of a table that goes to a file
#: What a table has no room for; it is in the file.
HIDDEN = {
    *("family", "variant", *"BTHKV", "bytes", "operations", "GB/s", "GFLOP/s"),
    *("copy bytes", "copy GB/s", "product", "product GFLOP/s"),
}
#: Decoding's batches and contexts unless given: what does not fit the memory is left out.
CONTEXTS = {"B": "1,8,64", "T": "1024,8192,65536,1048576"}
PROMPTS = {"T": "1024,4096,16384"}
SMALL, LARGE = {"B": "2", "T": "1024"}, {"B": "8", "T": "4096"}  # a step of training


class Question(NamedTuple):
    """`parts` are races by the text that is shown meanwhile."""

    name: str
    parts: list[tuple[str, Measure]]
    draw: Callable[[pathlib.Path, str, Sequence[Row]], None]


def kernels(family: str, sizes: Sequence[str], forms: Sequence[str]) -> Question:
    """Every form and pass of a family, or of "all", at every size."""
    cases, shapes = of_kernels.cases(family), of_kernels.shapes(sizes)
    for case in cases:
        of_kernels.forms(case, forms)
    parts: list[tuple[str, Measure]] = [
        (case.name, functools.partial(of_kernels.measure, case, shape, forms))
        for case in cases
        for shape in shapes
    ]
    return Question(f"kernels_{family}", parts, pictures.kernels)


def train(mixers: str | None, config: pathlib.Path | None, sizes: Sequence[str]) -> Question:
    """A step of training of mixers in models of one size, or of a run's model as it is."""
    if (mixers is None) == (config is None):
        raise ConfigError("Say what to train: give either --mixers a,b or --config FILE.")
    if mixers is not None:
        usual = SMALL if jax.default_backend() == "cpu" else LARGE
        asked = [(models.entered(mixers, s), s.B, s.T) for s in models.sizes(_or(usual, sizes))]
        return Question("train", [_step(*one) for one in asked], pictures.train)
    assert config is not None
    if sizes:
        raise ConfigError(f"The sizes of {config} are its own: leave out {sizes[0]}.")
    run = runs.load(config)
    step = _step(models.of_run(run, config.stem), run.data.batch, run.data.length)
    return Question(f"train_{config.stem}", [step], pictures.train)


def prefill(mixers: str, sizes: Sequence[str]) -> Question:
    """Reading prompts of several lengths."""
    parts = _of_sizes(reading.prefill, mixers, _or(PROMPTS, sizes))
    return Question("prefill", parts, pictures.prefill)


def decode(mixers: str, sizes: Sequence[str]) -> Question:
    """A step of decoding, by batch and context."""
    parts = _of_sizes(reading.decode, mixers, _or(CONTEXTS, sizes))
    return Question("decode", parts, pictures.decode)


def answer(
    question: Question, command: str, rounds: int, out: pathlib.Path | None = None
) -> list[Row]:
    """Measure, print a table, write NAME_DEVICE.json and its pictures; raises ConfigError where
    nothing could be measured. `command` is what the file says it came from."""
    head, folder = record.head(command), record.folder(out)
    name, rows = f"{question.name}_{machine.name()}", []
    with Console(stderr=True).status(name) as status:
        top = ceilings()
        for text, measure in question.parts:
            status.update(f"{name}: {text}")
            rows += measure(rounds, top)
    measured = [row for row in rows if record.LEFT_OUT not in row]
    if not measured:
        raise ConfigError(f"Nothing was measured: {rows[0][record.LEFT_OUT].rstrip('.')}.")
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(record.table(name, rows, HIDDEN))
    path = record.save(folder, name, head | {"rows": rows})
    question.draw(folder, name, measured)
    console.print(f"{path}, {path.with_suffix('.png')}")
    return rows


def _step(entries: Sequence[Entry], batch: int, length: int) -> tuple[str, Measure]:
    return f"{batch} rows of {length}", functools.partial(
        of_training.measure, entries, batch, length
    )


def _of_sizes(measure, mixers: str, sizes: Sequence[str]) -> list[tuple[str, Measure]]:
    ask = lambda size: functools.partial(measure, models.entered(mixers, size), size)
    tell = lambda size: f"batch {size.B}, {size.T} tokens"
    return [(tell(size), ask(size)) for size in models.sizes(sizes)]


def _or(usual: dict[str, str], given: Sequence[str]) -> list[str]:
    """The fields that are given, and the usual ones that are not."""
    names = {field.partition("=")[0] for field in given}
    return [f"{name}={text}" for name, text in usual.items() if name not in names] + [*given]
