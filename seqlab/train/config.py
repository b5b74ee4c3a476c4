"""A run is one frozen config; a config file is Python that defines `config`."""

import pathlib
import re
import runpy
import sys
import traceback
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab import settings
from seqlab.errors import ConfigError, SeqlabError
from seqlab.layers.linear_kinds import check_trains
from seqlab.models import lm
from seqlab.parallel.mesh import Travel
from seqlab.settings import STRICT
from seqlab.train.data import Data
from seqlab.train.objective import NEXT_TOKEN, Objective
from seqlab.train.optimizer import Config as Optimizer


@dataclass(frozen=True, config=STRICT)
class Mesh:
    """How many devices share the batch, the sequence and the heads, and how what mixers remember
    travels along the sequence (see `parallel.use_mesh` and `parallel.mesh.Travel`).

    groups  lay the documents of a batch on fewer devices than `seq` where they are short, on so
            many in turn as is predicted to be fastest (see `parallel.turns`)
    """

    data: PositiveInt = 1
    seq: PositiveInt = 1
    model: PositiveInt = 1
    strategy: str = Travel().strategy
    attention: str = Travel().attention
    hops: PositiveInt | None = None
    blocks: PositiveInt | None = None
    row: PositiveInt | None = None
    groups: bool = False

    def __post_init__(self):
        self.travel.check(self.seq)
        if self.groups and (self.seq == 1 or self.seq & (self.seq - 1)):
            raise ConfigError(
                f"mesh.groups halves the mesh.seq = {self.seq} devices of a row: make them a power "
                "of two above 1, or leave groups out."
            )

    @property
    def travel(self) -> Travel:
        """The part that says how."""
        return Travel(self.strategy, self.attention, self.hops, self.blocks, self.row)


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """Save every so many steps and keep the newest few; a failed save warns or stops the run."""

    every: PositiveInt = 200
    keep: PositiveInt = 2
    on_failure: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True, config=STRICT)
class Track:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    wandb: str | None = None  # the name of a Weights & Biases project


@dataclass(frozen=True, config=STRICT)
class Config:
    """One training run.

    steps          optimizer steps; each sees data.batch rows of data.length tokens
    objective      what is trained for: the next token, or a prefix (see `train.objective`)
    start          a saved or published model, or a run, whose weights this run begins with; `model`
                   is then its config (`store.load_config`); it is read once, and not by a run that
                   goes on; None draws the weights
    accumulate     parts that a batch is cut in, to fit memory; the result is the same
    evaluate_every steps between evaluations on data.held_out; 0 is only at the end
    samples        prompts continued by `sample_tokens` tokens at the end, for the report
    max_bad_steps  steps in a row whose gradients may be NaN or infinite (they are skipped)
    """

    model: lm.Config
    data: Data
    steps: PositiveInt
    optimizer: Optimizer = Optimizer()
    objective: Objective = NEXT_TOKEN
    start: str | None = None
    accumulate: PositiveInt = 1
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    evaluate_every: NonNegativeInt = 100
    samples: tuple[str, ...] = ()
    sample_tokens: NonNegativeInt = 300
    track: Track = Track()
    max_bad_steps: PositiveInt = 20
    seed: NonNegativeInt = 0

    def __post_init__(self):
        check_trains(self.model.linear)
        if self.data.batch % self.accumulate:
            raise ConfigError(
                f"data.batch = {self.data.batch} does not divide into accumulate = "
                f"{self.accumulate} parts: change one of them."
            )
        if self.mesh.groups and self.accumulate > 1:
            raise ConfigError(
                f"mesh.groups cuts a batch in turns by itself: leave out accumulate = "
                f"{self.accumulate}."
            )
        if self.mesh.groups and self.objective != NEXT_TOKEN:
            raise ConfigError(
                "mesh.groups lays documents anew, which a prefix does not allow: leave out one of "
                "mesh.groups and objective."
            )
        for name, axis, size in (
            ("batch", "data", self.data.batch // self.accumulate),
            ("length", "seq", self.data.length),
        ):
            devices = getattr(self.mesh, axis)
            if size % devices:
                raise ConfigError(
                    f"data.{name} gives {size} per step, which does not divide over "
                    f"mesh.{axis} = {devices} devices: change one of them."
                )


#: What may differ between a run and its continuation.
MAY_CHANGE = (
    *("steps", "mesh", "checkpoint", "evaluate_every", "samples", "sample_tokens", "track"),
    "max_bad_steps",
)


def load(path: str | pathlib.Path, overrides: list[str] | None = None) -> Config:
    """The `config` of a Python file, with `dotted.name=value` overrides applied.

    The file may import modules that lie beside it, such as a mixer of your own.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ConfigError(
            f"There is no config file {path} but a folder: give the .py file (a run goes on with "
            "its own and --out; a saved or packed model is for inference)."
        )
    if not path.is_file():
        raise ConfigError(f"There is no config file {path}: give the path of a .py file.")
    name = re.sub(r"\W", "_", path.stem)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        config = runpy.run_path(str(path), run_name=name).get("config")
    except SeqlabError as error:
        raise type(error)(f"{_place(path, error)}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{_place(path, error)}: {settings.raised(error)}.") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not isinstance(config, Config):
        raise ConfigError(f"{path} defines no `config`: assign a seqlab.train.config.Config to it.")
    return settings.override(config, overrides or [])


def _place(path: pathlib.Path, error: Exception) -> str:
    """The file and its line that led to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)
