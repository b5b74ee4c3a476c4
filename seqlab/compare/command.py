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


@dataclasses.dataclass(frozen=True)
class Terms:
    """What all entries have in common."""

    task: str
    name: str  # of the protocol
    protocol: Protocol
    budget: Budget
    rates: tuple[float, ...]
    seeds: int

    def empty(self, entry: Entry) -> Result:
        """A result of this entry without runs."""
        asked_apart = {"lr", "steps", "widths"}
        fields = {k: v for k, v in settings.plain(self.protocol).items() if k not in asked_apart}
        model = entry.model.skeleton()
        return Result(
            label=entry.label,
            width=entry.model.d_model,
            model=settings.plain(entry.model),
            setting={"task": self.task, "protocol": self.name, "budget": str(self.budget)} | fields,
            parameters=summary.parameter_count(model),
            state_bytes=summary.state_bytes(model),
        )


def compare(
    task: str,
    mixers: str,
    *,
    out: pathlib.Path,
    protocol_name: str = "ci",
    budget: str | None = None,
    lr: str | None = None,
    seeds: int = 1,
    width: str | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Train every mixer of `mixers` (see `entries.parse`) and write the page to the folder `out`.

    What is finished there already is kept; of several processes with one folder each takes what no
    other has. Returns what is finished, and raises ConfigError for bad input before any training.
    """
    chosen = protocol(task, protocol_name)
    spent = budgets.parse(budget) if budget else Budget(chosen.steps, "steps")
    rates = _numbers(lr, "--lr", float) or chosen.lr
    terms = Terms(task, protocol_name, chosen, spent, rates, seeds)
    entered = entries.parse(mixers, chosen, _numbers(width, "--width", int))
    kept = [results.load(results.folder(out, entry), terms.empty(entry)) for entry in entered]
    with Board([entry.name for entry in entered], console) as board:
        for entry, result in zip(entered, kept, strict=True):
            if results.wanted(result, rates, seeds):
                _train(results.folder(out, entry), entry, terms, board)
            else:
                board.finish(entry.name, results.only(result, rates, seeds), again=True)
        finished = _finished(out, entered, terms)
        if finished:
            facts = {"Protocol": terms.name, "Budget": str(spent), "Seeds": seeds, "Rates": rates}
            board.note(str(report.write(out, finished, task, chosen, facts)))
    return finished


def _train(folder: pathlib.Path, entry: Entry, terms: Terms, board: Board) -> None:
    """Make the runs of an entry that are missing, saving each, unless another process is at it."""
    name = entry.name
    try:
        with RunLock(folder):
            result = results.load(folder, terms.empty(entry))  # another may just have finished
            board.start(name, result)
            trial = Trial(entry, terms.protocol, terms.budget)
            say = lambda *now: board.say(name, *now)
            for lr, seed in results.wanted(result, terms.rates, terms.seeds):
                runs = (*result.runs, trial.run(lr, seed, say))
                result = dataclasses.replace(result, runs=runs)
                results.save(folder, result)
    except InUse as other:
        return board.note(f"{name}: left to another process; {other}")
    board.finish(name, results.only(result, terms.rates, terms.seeds), again=False)


def _finished(out: pathlib.Path, entered: list[Entry], terms: Terms) -> list[Result]:
    """What is in the folders by now."""
    found = [results.load(results.folder(out, entry), terms.empty(entry)) for entry in entered]
    whole = [r for r in found if not results.wanted(r, terms.rates, terms.seeds)]
    return [results.only(result, terms.rates, terms.seeds) for result in whole]


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
