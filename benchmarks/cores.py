"""Programs side by side, a core for each.

A small model's step has little for a second core to do: two programs with a core each get through
about twice the work of one with both.
"""

import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from seqlab.errors import SeqlabError


def mine() -> list[int]:
    """The cores that this process may use, by number; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def settle(core: int) -> None:
    """Keep this process to a core; call it before there are threads."""
    if mine():
        os.sched_setaffinity(0, {core})


def run(
    programs: Mapping[str, Sequence[str]], logs: pathlib.Path, done: Callable[[str], object]
) -> None:
    """Run `python -m` with each program's arguments and `--core N`, as many at once as there are
    cores; call `done` with its name when one has ended. What they say goes to logs/NAME.txt.

    Raises SeqlabError where one fails; those that run by then end first, and no other begins.
    """
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in mine() or range(1):
        free.put(core)
    logs.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> str:
        core = free.get()
        try:
            command = [sys.executable, "-m", *programs[name], "--core", str(core)]
            with open(logs / f"{name}.txt", "w") as log:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        finally:
            free.put(core)
        if status:
            raise SeqlabError(f"{name} ended with status {status}: see {logs / name}.txt.")
        return name

    with ThreadPoolExecutor(max(1, len(mine()))) as pool:
        try:
            for future in as_completed([pool.submit(one, name) for name in programs]):
                done(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
