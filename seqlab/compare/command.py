"""`seqlab compare`: mixers trained on a task under one protocol, then a page of what came out."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from seqlab import settings
from seqlab.compare import budget as budgets
from seqlab.compare import entries, report, results
from seqlab.compare.budget import Budget
from seqlab.compare.entries import Entry
from seqlab.compare.live import Board
from seqlab.compare.results import Result
from seqlab.compare.trial import Trial
from seqlab.errors import ConfigError
from seqlab.models import summary
from seqlab.tasks import Protocol, protocol
from seqlab.train.lock import InUse, RunLock

N = TypeVar("N", int, float)
_ASKED_APART = {"lr", "steps", "widths"}  # fields of a protocol that runs of one setting differ in


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Entries, and what they have in common."""

    task: str
    name: str  # of the protocol
    protocol: Protocol
    budget: Budget
    rates: tuple[float, ...]
    seeds: int
    out: pathlib.Path
    entries: tuple[Entry, ...]

    def train(self, board: Board) -> None:
        """Make all runs that are missing, and show those that are there."""
        for entry in self.entries:
            kept = self.kept(entry)
            if self.missing(kept):
                self._train(entry, board)
            else:
                board.finish(entry.name, self._asked(kept), again=True)

    def finished(self) -> list[Result]:
        """Every entry that has all its runs."""
        kept = [self.kept(entry) for entry in self.entries]
        return [self._asked(result) for result in kept if not self.missing(result)]

    def kept(self, entry: Entry) -> Result:
        """What the folder holds of an entry, also what was asked for another time."""
        return results.load(results.folder(self.out, entry), self._empty(entry))

    def missing(self, result: Result) -> list[tuple[float, int]]:
        """The pairs of rate and seed that have no run yet."""
        there = {(run.lr, run.seed) for run in result.runs}
        asked = [(lr, seed) for seed in range(self.seeds) for lr in self.rates]
        return [pair for pair in asked if pair not in there]

    @property
    def facts(self) -> dict[str, str | int]:
        rates = ", ".join(f"{rate:.3g}" for rate in self.rates)
        asked = {"Protocol": self.name, "Budget": str(self.budget), "Rates": rates}
        return asked | {"Seeds": self.seeds}

    def _train(self, entry: Entry, board: Board) -> None:
        """Make the runs of an entry, saving each, unless another process is at it."""
        folder = results.folder(self.out, entry)
        try:
            with RunLock(folder):
                result = self.kept(entry)  # another may just have finished
                board.start(entry.name, result)
                trial = Trial(entry, self.protocol, self.budget)
                for lr, seed in self.missing(result):
                    run = trial.run(lr, seed, lambda *now: board.say(entry.name, *now))
                    result = dataclasses.replace(result, runs=(*result.runs, run))
                    results.save(folder, result)
        except InUse as other:
            return board.note(f"{entry.name}: left to another process; {other}")
        board.finish(entry.name, self._asked(result), again=False)

    def _asked(self, result: Result) -> Result:
        """The result with the runs of this comparison alone, in their order."""
        runs = [r for r in result.runs if r.lr in self.rates and r.seed < self.seeds]
        runs = tuple(sorted(runs, key=lambda run: (run.lr, run.seed)))
        return dataclasses.replace(result, runs=runs)

    def _empty(self, entry: Entry) -> Result:
        fields = settings.plain(self.protocol)
        same = {name: value for name, value in fields.items() if name not in _ASKED_APART}
        asked = {"task": self.task, "protocol": self.name, "budget": str(self.budget)}
        model = entry.model.skeleton()
        return Result(
            label=entry.label,
            width=entry.model.d_model,
            model=settings.plain(entry.model),
            setting=asked | same,
            parameters=summary.parameter_count(model),
            state_bytes=summary.state_bytes(model),
        )


def compare(comparison: Comparison, console: Console | None = None) -> list[Result]:
    """Train what is missing and write the page; returns what is finished.

    What is finished already is kept; of several processes with one folder each takes what no other
    has.
    """
    c = comparison
    with Board([entry.name for entry in c.entries], console) as board:
        c.train(board)
    finished = c.finished()
    if finished:
        board.note(str(report.write(c.out, finished, c.task, c.protocol, c.facts)))
    return finished


def ask(
    task: str,
    mixers: str,
    *,
    out: pathlib.Path,
    protocol_name: str = "ci",
    budget: str | None = None,
    lr: str | None = None,
    seeds: int = 1,
    width: str | None = None,
) -> Comparison:
    """The comparison of every mixer of `mixers` (see `entries.parse`), kept in the folder `out`.

    Raises ConfigError for bad input, and where the folder holds something else.
    """
    chosen = protocol(task, protocol_name)
    comparison = Comparison(
        task,
        protocol_name,
        chosen,
        budgets.parse(budget) if budget else Budget(chosen.steps, "steps"),
        _numbers(lr, "--lr", float) or chosen.lr,
        seeds,
        out,
        entries.parse(mixers, chosen, _numbers(width, "--width", int)),
    )
    for entry in comparison.entries:
        comparison.kept(entry)
    return comparison


def _numbers(text: str | None, option: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """Numbers above 0 from "1e-3,1e-2"; none from None."""
    if text is None:
        return ()
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise ConfigError(f"{option} {text!r} is not a list of numbers above 0, such as 1e-3,1e-2.")
    return numbers
