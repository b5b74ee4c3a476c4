"""How long two things take, in turns, so that other work on the machine disturbs both."""

import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import benchmarks.record as record

Work = Callable[[], object]  # returns when its work is done


class Race(NamedTuple):
    """The best of several rounds of each: seconds, and seconds of all its threads together."""

    ours: float
    theirs: float
    our_cpu: float
    their_cpu: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer we are."""
        return self.theirs / self.ours

    @property
    def cpu_ratio(self) -> float:
        """The same in CPU seconds, which a busy machine distorts less."""
        return self.their_cpu / self.our_cpu


def race(ours: Work, theirs: Work, rounds: int) -> Race:
    """Each runs once unmeasured, to compile, then `rounds` times in turns."""
    ours(), theirs()
    laps = [(lap(ours), lap(theirs)) for _ in range(rounds)]
    best = lambda who, what: min(pair[who][what] for pair in laps)
    return Race(best(0, 0), best(1, 0), best(0, 1), best(1, 1))


def seconds(work: Work, rounds: int) -> float:
    """The best of `rounds`, after one unmeasured."""
    work()
    return min(lap(work)[0] for _ in range(rounds))


def lap(work: Work) -> tuple[float, float]:
    """Seconds, and CPU seconds, of one run."""
    began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def peak(work: Work) -> int:
    """Bytes that this process holds at most while it works, beyond what it held before (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = record.memory("VmRSS")
    work()
    return record.memory("VmHWM") - before
