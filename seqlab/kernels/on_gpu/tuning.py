"""Measures rows of the table of `blocks`, when asked to (python -m seqlab.kernels.on_gpu)."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from seqlab.errors import ConfigError, nearest
from seqlab.kernels.on_gpu import trust
from seqlab.kernels.on_gpu.blocks import Blocks, Row

RUNS = 20  # of which the median counts


class Contest(NamedTuple):
    """Block sizes for one class of shapes: run(blocks)(*args) is the kernel's work."""

    shape: str
    run: Callable[[Blocks], Callable]
    args: tuple
    candidates: tuple[Blocks, ...]


#: Of each GPU kernel by its name: () -> its contests. A family enters its own.
CONTESTS: dict[str, Callable[[], list[Contest]]] = {}


def contests_of(kernel: str) -> Callable[[Callable], Callable]:
    """Enter the decorated function in CONTESTS."""
    return lambda contests: CONTESTS.setdefault(kernel, contests)


def tune(kernel: str, seconds: Callable[..., float] | None = None) -> list[Row]:
    """The fastest row for each class of shapes of a kernel, on the GPU here.

    seconds(f, *args) -> what f(*args) takes. Candidates that do not compile take no part; a class
    of shapes without any other has no row. Raises ConfigError where there is no such kernel, or no
    GPU.
    """
    if kernel not in CONTESTS:
        raise ConfigError(f"No GPU kernel is called {kernel!r}: {nearest(kernel, CONTESTS)}")
    device = trust.gpu_kind()
    if device is None:
        raise ConfigError("Block sizes are measured on a GPU, and there is none here.")
    rows = []
    for contest in CONTESTS[kernel]():
        times = {}
        for blocks in contest.candidates:
            try:
                times[blocks] = (seconds or _seconds)(jax.jit(contest.run(blocks)), *contest.args)
            except Exception as error:  # whatever a compiler raises, there are others
                first = str(error).splitlines()[:1]
                print(f"{kernel} {contest.shape} {blocks}: {first}", file=sys.stderr)
        if times:
            fastest = min(times, key=lambda blocks: times[blocks])
            rows.append(Row(kernel, device, contest.shape, *fastest, measured=True))
    return rows


def _seconds(f: Callable, *args) -> float:
    jax.block_until_ready(f(*args))
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
