"""Checkpoints that are whole or absent: written aside, hashed, renamed; verified before use."""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp

from seqlab.errors import CheckpointError
from seqlab.models import artifacts
from seqlab.models.arrays import ARRAYS, CONTENTS, describe, groups, read_arrays, read_contents
from seqlab.models.arrays import steps as steps_in
from seqlab.parallel import processes

_SAVING = "saving-"  # prefix of a step that is being written
_NONE, _ALL_DAMAGED = -1, -2


class Restored(NamedTuple):
    step: int
    arrays: dict[str, jax.Array]
    metadata: dict[str, Any]


class Checkpoints:
    """The steps of a run, in folders named by their number; the newest `keep` stay.

    `save` copies the arrays and returns; a thread writes them, hashes them and gives the folder
    its name, so that a folder with a number for a name is complete. A save that fails (a full
    disk, say) leaves earlier steps as they are and is reported at the next call: `on_failure`
    "warn" tells `on_warning`, "stop" raises CheckpointError.

    With several processes each writes its part; process 0 alone names, removes and judges folders.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 2,
        on_failure: Literal["warn", "stop"] = "warn",
        on_warning: Callable[[str], object] = warnings.warn,
    ):
        self.folder = pathlib.Path(folder).resolve()
        self.keep, self.on_failure, self.on_warning = keep, on_failure, on_warning
        self._checkpointer = _checkpointer()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seqlab-checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._newest: int | None = None
        _quiet()

    def save(self, step: int, arrays: Mapping[str, jax.Array], metadata: Mapping) -> None:
        """Begin to save step `step`; the arrays may be donated when this returns.

        Names are `group/name`; metadata is strict JSON. The newest step is not saved twice.
        """
        self.wait()
        if processes.once(lambda: step == self._newest):
            return
        contents = json.dumps(
            {"arrays": describe(arrays), "metadata": dict(metadata)}, allow_nan=False
        )
        self._newest, aside = step, self.folder / f"{_SAVING}{step}"
        try:
            processes.once(lambda: _begin(aside, contents))
            apart = groups({name: _own(array) for name, array in arrays.items()})
            items = {group: ocp.args.StandardSave(tree) for group, tree in apart.items()}
            self._checkpointer.save(aside / ARRAYS, args=ocp.args.Composite(**items))
        except Exception as error:
            self._failed(step, error)
            return
        self._pending = step, self._thread.submit(self._finish, step, aside)

    def wait(self) -> None:
        """Until the save under way, if any, is on disk; reports it if it failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is not None:
            self._failed(step, error)

    def poll(self) -> None:
        """Report a save that has ended by now, without waiting for one that has not."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def close(self) -> None:
        """Finish what is under way; no thread is left."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps that are there, whole or damaged, oldest first."""
        return steps_in(self.folder)

    def latest(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> Restored | None:
        """The newest good step, its arrays placed as the shardings in `like` say; None if there
        never was one.

        A damaged step is renamed aside with one warning, and the one before is used; what a crash
        left half-written is removed. Raises CheckpointError if steps are there but all are
        damaged, or if the good one holds other arrays than `like`.
        """
        self.wait()
        step = processes.once(self._newest_good)
        if step == _NONE:
            return None
        if step == _ALL_DAMAGED:
            raise CheckpointError(
                f"Every checkpoint in {self.folder} is damaged: restore one from a copy, or remove "
                "the folder to begin anew."
            )
        self._newest, folder = step, self.folder / str(step)
        return Restored(step, read_arrays(folder, like), read_contents(folder)["metadata"])

    def _newest_good(self) -> int:
        for left in self.folder.glob(f"{_SAVING}*"):
            shutil.rmtree(left, ignore_errors=True)
        for step in reversed(self.steps()):
            folder = self.folder / str(step)
            try:
                artifacts.verify(folder)
                return step
            except CheckpointError as error:
                aside = _set_aside(folder)
                self.on_warning(f"Checkpoint {step} was set aside as {aside.name}: {error}")
        here = self.folder.iterdir() if self.folder.is_dir() else ()
        damaged = any(re.fullmatch(r"\d+\.damaged\d*", path.name) for path in here)
        return _ALL_DAMAGED if damaged else _NONE

    def _finish(self, step: int, aside: pathlib.Path) -> None:
        self._checkpointer.wait_until_finished()
        if not processes.first():
            return
        artifacts.publish(aside, self.folder / str(step))
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def _failed(self, step: int, error: BaseException) -> None:
        self._newest = None
        with contextlib.suppress(Exception):  # it would raise this error at the next save again
            self._checkpointer.close()
        self._checkpointer = _checkpointer()
        shutil.rmtree(self.folder / f"{_SAVING}{step}", ignore_errors=True)
        message = (
            f"Saving step {step} in {self.folder} failed ({_reason(error)}); earlier checkpoints "
            "are intact: free space or mend the folder."
        )
        if self.on_failure == "stop":
            raise CheckpointError(message) from error
        self.on_warning(message)


def _checkpointer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def _begin(aside: pathlib.Path, contents: str) -> None:
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / CONTENTS).write_text(contents, "utf-8")
    except OSError as error:
        raise CheckpointError(_reason(error)) from error


def _own(array: jax.Array) -> jax.Array:
    """A copy where orbax reads the buffer itself, so that a step can still donate the original.

    That is on a CPU; from an accelerator orbax has copied to the host before `save` returns.
    """
    return array.copy() if any(d.platform == "cpu" for d in array.devices()) else array


def _reason(error: BaseException) -> str:
    """'No space left on device', out of an OSError or of tensorstore's account of one."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    lines = str(error).splitlines()
    return os.strerror(number) if number else lines[0] if lines else type(error).__name__


def _quiet() -> None:
    """A failed save reaches us as an error; keep orbax and tensorstore from printing it as well.

    Their threads go on calling back into an event loop that has ended, and tasks that nobody
    awaited are collected, for as long as the process lives: so this is never undone.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)
    before = sys.unraisablehook
    if not (isinstance(before, functools.partial) and before.func is _unless_late):
        sys.unraisablehook = functools.partial(_unless_late, before)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def _unless_late(before: Callable, unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        before(unraisable)


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    names = (f"{folder.name}.damaged{number}" for number in ("", *range(2, 1000)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    try:
        return folder.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is damaged and cannot be renamed ({error.strerror}): mend the permissions."
        ) from error
