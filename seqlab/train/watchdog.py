"""Many processes wait for each other in every step; what is said here is why a wait will not end.

A collective cannot be cancelled, so when one process is gone or silent the others can only end, in
time and with the reason. Each keeps a small file in the run folder: alive when (a thread counts),
how far (the training thread counts), how it ended. Process 0 reads them all and judges; the others
read its file. Files, because the run folder is shared anyway, and a file outlives its process.
"""

import contextlib
import faulthandler
import json
import math
import os
import pathlib
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import jax

from seqlab.errors import ConfigError
from seqlab.launch import PEER_GONE
from seqlab.parallel import processes

FOLDER = "processes"
STALLED = 75  # exit status where a process is silent
SLOW = 60  # compiling, evaluating first and saving may take so many times as long as a step


class Limits(NamedTuple):
    """Seconds. heartbeat: without a sign of life after which a process counts as gone. stall: the
    least time without progress that counts as a stall; it is 20 median steps if that is longer."""

    heartbeat: float = 10.0
    stall: float = 60.0


LIMITS = Limits()


class Watchdog:
    """Watches over the training of many processes; with one process it does nothing.

    The training thread says at each turn where it is (`at`); within the context, a thread ends the
    process if nothing moves: with code 75 and the stacks of all threads where a process is silent,
    with 76 where one is gone.
    """

    def __init__(self, folder: pathlib.Path, limits: Limits = LIMITS):
        self.folder, self.limits = folder / FOLDER, limits
        self.index, self.count = jax.process_index(), jax.process_count()
        self._turns, self._doing, self._slow = 0, "starting", True
        self._moved, self._began = time.monotonic(), math.nan
        self._steps: deque[float] = deque(maxlen=64)
        self._heard: dict[int, tuple[int, float]] = {}  # process -> (its count, when it changed)
        self._said: dict[int, dict[str, Any]] = {}  # process -> what was read of it last
        self._beats, self._end = 0, None
        self._closed = threading.Event()

    def at(self, doing: str, *, slow: bool = False) -> None:
        """The training thread begins to do something; every process says the same in turn."""
        self._turns, self._doing, self._slow = self._turns + 1, doing, slow
        self._moved = time.monotonic()

    def begins(self, step: int, *, slow: bool = False) -> None:
        """A step begins, with reading its batch; `slow` where it may compile."""
        now, before = time.monotonic(), self._began
        self._began = math.nan if slow else now
        if not math.isnan(before):
            self._steps.append(now - before)
        self.at(f"reading the batch of step {step}", slow=slow)

    def __enter__(self) -> "Watchdog":
        if self.count > 1:
            self._run = processes.once(lambda: [os.getpid(), time.time_ns()])
            processes.once(self._clear)
            self._write()
            self._check_shared()
            threading.Thread(target=self._watch, name="seqlab-watchdog", daemon=True).start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if self.count > 1 and error is None:
            self._closed.set()
            processes.wait_for_all("the end of training")
            if self.index == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
        elif self.count > 1:
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                # most likely a process is gone: let the thread find out which, and say so
                time.sleep(self.limits.heartbeat + 5)
            code = getattr(error, "code", processes.CRASHED)
            self._end = [code, f"{kind.__name__}: {error}".splitlines()[0]]
            self._closed.set()
            self._write()
            # what is left to close may wait for the others, who have gone
            last = threading.Timer(10, self._stop, self._end)
            last.daemon = True
            last.start()

    def _clear(self) -> None:
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self.folder} ({error.strerror}): choose a run folder you can write."
            ) from error

    def _check_shared(self) -> None:
        end = time.monotonic() + 10  # a network file system may show new files late
        while self._read(0) is None and time.monotonic() < end:
            time.sleep(0.1)
        sees = processes.everyone(self._read(0) is not None)
        if not all(sees):
            raise ConfigError(
                f"Process {sees.index(False)} does not see what process 0 writes in "
                f"{self.folder.parent}: put the run folder (--out) where all machines share it."
            )

    def _watch(self) -> None:
        every, before = min(1.0, self.limits.heartbeat / 10), time.monotonic()
        while not self._closed.wait(every):
            self._forgive(time.monotonic() - before - every)
            before = time.monotonic()
            self._write()
            verdict = self._judge() if self.index == 0 else self._obey()
            # an error that is everybody's is told by everybody, at about the same time
            if verdict is not None and not self._closed.wait(1):
                self._stop(*verdict)

    def _forgive(self, late: float) -> None:
        """A thread that was held up itself (a file server that paused) has heard nobody."""
        if late > 1:
            self._heard = {p: (beats, since + late) for p, (beats, since) in self._heard.items()}

    def _judge(self) -> tuple[int, str] | None:
        """What process 0 finds: an exit code and the reason, or None where all is well."""
        said = [self._read(process) for process in range(self.count)]
        for process in range(1, self.count):
            its = said[process]
            if its and its["end"]:
                return PEER_GONE, f"{_who(its)} ended ({its['end'][1]})"
            if self._unheard(process, its):
                return PEER_GONE, (
                    f"{_who(its) or f'process {process}'} is gone: nothing was heard of it for "
                    f"{self.limits.heartbeat:.0f} s"
                )
        waited = time.monotonic() - self._moved
        if waited > self._patience():
            turns = [s["turns"] if s else 0 for s in said]
            late = [_who(s) for s, turn in zip(said, turns, strict=True) if s and turn < max(turns)]
            silent = ", ".join(late) or "none of the processes is behind the others: all"
            doing = said[turns.index(min(turns))] or {"doing": "starting"}
            return STALLED, f"no progress for {waited:.0f} s; silent: {silent} ({doing['doing']})"
        return None

    def _obey(self) -> tuple[int, str] | None:
        """What process 0 decided, or that it is gone itself."""
        said = self._read(0)
        if said and said["end"]:
            code, why = said["end"]
            return (
                (code, why)
                if code in (STALLED, PEER_GONE)
                else (
                    PEER_GONE,
                    f"{_who(said)} ended ({why})",
                )
            )
        if self._unheard(0, said):
            return (
                PEER_GONE,
                f"process 0 is gone: nothing was heard for {self.limits.heartbeat:.0f} s",
            )
        return None

    def _unheard(self, process: int, said: dict | None) -> bool:
        """Whether a process has not written for too long, and nothing moves here either."""
        now, beats = time.monotonic(), said["beats"] if said else -1
        count, since = self._heard.get(process, (-2, now))
        if beats not in (count, -1):
            self._heard[process] = beats, now
            return False
        self._heard.setdefault(process, (count, since))
        return now - max(since, self._moved) > self.limits.heartbeat

    def _patience(self) -> float:
        step = statistics.median(self._steps) if self._steps else 0.0
        return max(self.limits.stall, 20 * step) * (SLOW if self._slow else 1)

    def _stop(self, code: int, why: str) -> None:
        """End this process here and now; process 0, whose end ends all, does so last."""
        sys.stdout.flush()
        if code == STALLED:
            faulthandler.dump_traceback(all_threads=True)
        print(
            f"seqlab: process {self.index} ends: {why}; run the same command on every machine to "
            "go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        self._end = [code, why]
        self._write()
        if self.index == 0:
            self._let_the_others_end()
        os._exit(code)

    def _let_the_others_end(self) -> None:
        """Wait a little for those that were heard of just now to say why they end, too."""
        end, recent = (
            time.monotonic() + processes.LAST,
            time.monotonic() - self.limits.heartbeat / 2,
        )
        alive = [process for process, (_, since) in self._heard.items() if since > recent]
        while alive and time.monotonic() < end:
            if all(said["end"] for said in map(self._read, alive) if said):
                end = time.monotonic()
            time.sleep(1)  # also for them to end, once they have said so

    def _write(self) -> None:
        self._beats += 1
        said = {
            "run": self._run,
            "process": self.index,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beats": self._beats,
            "turns": self._turns,
            "doing": self._doing,
            "end": self._end,
        }
        with contextlib.suppress(OSError):  # a full disk: the others see a process that is silent
            (self.folder / f"{self.index}.json").write_text(json.dumps(said), "utf-8")

    def _read(self, process: int) -> dict[str, Any] | None:
        """What a process of this very run wrote last, or what was last read of it, if anything."""
        with contextlib.suppress(OSError, ValueError):  # it may be writing just now
            said = json.loads((self.folder / f"{process}.json").read_text("utf-8"))
            if said["run"] == self._run:
                self._said[process] = said
        return self._said.get(process)


def _who(said: dict | None) -> str:
    return f"process {said['process']} (pid {said['pid']} on {said['host']})" if said else ""
