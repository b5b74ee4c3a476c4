"""How long several things take, in turns, so that other work on the machine disturbs them all."""

import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from seqlab.bench.machine import memory

SPREAD = " spread"  # after a figure's name: the quartiles beside its median

Work = Callable[[], object]  # returns when its work is done


class Spread(NamedTuple):
    """The median of several rounds; half of them lie between `low` and `high`."""

    median: float
    low: float
    high: float


class Laps(NamedTuple):
    """Of one contestant, round by round."""

    seconds: np.ndarray
    cpu: np.ndarray  # seconds of all threads of this process together


def race(works: Mapping[str, Work], rounds: int, least: float = 0.0) -> dict[str, Laps]:
    """Each runs once unmeasured, to compile; then all run `rounds` times in turns, every other
    round backwards. A lap is as many runs in a row as fill `least` seconds."""
    for work in works.values():
        work()
    runs = {name: _runs(work, least) for name, work in works.items()}
    laps = {name: np.zeros((rounds, 2)) for name in works}
    for at in range(rounds):
        for name in list(works)[:: -1 if at % 2 else 1]:
            laps[name][at] = lap(works[name], runs[name])
    return {name: Laps(*times.T) for name, times in laps.items()}


def lap(work: Work, runs: int = 1) -> tuple[float, float]:
    """Seconds, and CPU seconds, of one run: the mean of so many in a row."""
    began = time.perf_counter(), time.process_time()
    for _ in range(runs):
        work()
    return (time.perf_counter() - began[0]) / runs, (time.process_time() - began[1]) / runs


def figure(name: str, values: Spread) -> dict[str, Any]:
    """A median and its quartiles as two fields of a row."""
    return {name: _short(values.median), name + SPREAD: [_short(values.low), _short(values.high)]}


def spread(values) -> Spread:
    """The median and the quartiles beside it."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, low, high)


def ratio(theirs, ours) -> Spread:
    """How many times as fast as theirs ours is: each round's two times are divided."""
    return spread(theirs / ours)


def ratios(theirs: Laps, ours: Laps) -> dict[str, Any]:
    """Fields of a row: the ratio by the clock, and that of CPU seconds, which a busy machine
    distorts less."""
    clock = figure("ratio", ratio(theirs.seconds, ours.seconds))
    return clock | figure("ratio of CPU seconds", ratio(theirs.cpu, ours.cpu))


def seconds(work: Work, rounds: int) -> Spread:
    """Of a run of one thing by itself."""
    return spread(race({"": work}, rounds)[""].seconds)


def peak(work: Work) -> int:
    """Bytes that this process holds at most while it works, beyond what it held before (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def _short(value: float) -> float:
    """Five digits: there are no more in a time."""
    return float(np.format_float_positional(value, 5, fractional=False, trim="-"))


def _runs(work: Work, least: float) -> int:
    return max(1, math.ceil(least / lap(work)[0])) if least else 1
