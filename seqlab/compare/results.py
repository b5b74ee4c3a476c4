"""What came out for each entry, kept in a folder of its own, so that it is trained once."""

import json
import math
import pathlib
import urllib.parse
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from seqlab import settings
from seqlab.compare.entries import Entry
from seqlab.errors import ConfigError, SeqlabError
from seqlab.settings import STRICT
from seqlab.tasks import Accuracy
from seqlab.train.folder import put

FILE = "result.json"


@dataclass(frozen=True, config=STRICT)
class Run:
    """One training. `tests` has the accuracies by the tests' labels, none after a divergence, which
    came at step `diverged`."""

    lr: float
    seed: int
    steps: int
    seconds: float
    cpu_seconds: float
    loss: float | None
    tests: dict[str, Accuracy]
    diverged: int | None = None

    @property
    def accuracy(self) -> float:
        """The mean over all tests; NaN after a divergence."""
        return (
            float(np.mean([test.mean for test in self.tests.values()])) if self.tests else math.nan
        )


@dataclass(frozen=True, config=STRICT)
class Result:
    """All runs of an entry; `setting` is all that they have in common beside the model."""

    label: str
    width: int
    model: dict[str, Any]
    setting: dict[str, Any]
    parameters: int
    state_bytes: int  # of one sequence, whatever its length
    runs: tuple[Run, ...] = ()

    @property
    def best(self) -> tuple[Run, ...]:
        """The runs at the rate with the best accuracy, a seed each: those that finished, unless
        none did."""
        by_rate = {run.lr: [r for r in self.runs if r.lr == run.lr] for run in self.runs}
        whole = [[r for r in runs if r.tests] for runs in by_rate.values()]
        score = lambda runs: (len(runs), np.mean([r.accuracy for r in runs]))
        return tuple(max(filter(None, whole), key=score, default=self.runs[:1]))

    @property
    def accuracy(self) -> float:
        """The mean over tests and seeds at the best rate; NaN where every run diverged."""
        return float(np.mean([run.accuracy for run in self.best])) if self.best else math.nan

    def test(self, label: str) -> Accuracy:
        """The mean over seeds on one test at the best rate; NaN where every run diverged."""
        found = [run.tests[label] for run in self.best if label in run.tests]
        return Accuracy(*np.mean(found, 0).tolist()) if found else Accuracy(math.nan, math.nan)


def folder(out: pathlib.Path, entry: Entry) -> pathlib.Path:
    return out / f"{urllib.parse.quote(entry.label, safe='(),= ')}@{entry.model.d_model}"


def load(path: pathlib.Path, fresh: Result) -> Result:
    """What the folder `path` holds of this entry, or else `fresh`, which has no runs.

    Raises ConfigError where the folder holds another setting or model under this name.
    """
    file = path / FILE
    if not file.exists():
        return fresh
    try:
        found = settings.read(Result, json.loads(file.read_text("utf-8")), where=str(file))
    except (OSError, ValueError, TypeError, SeqlabError) as error:
        raise ConfigError(f"{file} is damaged: delete it, or give another --out.") from error
    for name in ("setting", "model"):
        if getattr(found, name) != getattr(fresh, name):
            raise ConfigError(
                f"{file} is of another {name} than is asked for: delete it, or give another --out."
            )
    return found


def save(path: pathlib.Path, result: Result) -> None:
    """Write the result; a reader sees the old file or the new one."""
    put(path / FILE, json.dumps(settings.plain(result), indent=1, allow_nan=False) + "\n")
