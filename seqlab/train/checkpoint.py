"""Checkpoints that are whole or absent: written aside, hashed, renamed; verified before use."""

import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from typing import IO, Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp

from seqlab.errors import CheckpointError, ConfigError
from seqlab.models import artifacts
from seqlab.models.arrays import CONTENTS, describe, groups, read_arrays, read_contents, steps

LOCK = "lock"
_SAVING = "saving-"  # prefix of a step that is being written


class Restored(NamedTuple):
    step: int
    arrays: dict[str, jax.Array]
    metadata: dict[str, Any]


class Checkpoints:
    """The steps of a run, in folders named by their number; the newest `keep` good ones stay.

    `save` copies the arrays and returns; a thread writes them, hashes them and gives the folder
    its name, so that a folder with a number for a name is complete. A save that fails (a full
    disk, say) leaves earlier steps as they are and is reported at the next call: `on_failure`
    "warn" tells `on_warning`, "stop" raises CheckpointError.
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
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self._checkpointer = _checkpointer()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seqlab-checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None

    def save(self, step: int, arrays: Mapping[str, jax.Array], metadata: Mapping) -> None:
        """Begin to save step `step`; the arrays may be donated when this returns.

        Names are `group/name`; metadata is JSON. A step that is there already is left alone.
        """
        self.wait()
        if (self.folder / str(step)).exists():
            return
        aside = self.folder / f"{_SAVING}{step}"
        contents = {"arrays": describe(arrays), "metadata": dict(metadata)}
        # on a CPU orbax reads the buffers themselves, which a donating step would overwrite
        copies = jax.tree.map(lambda a: a.copy(), groups(arrays))
        try:
            for left in self.folder.glob(f"{_SAVING}*"):  # of saves that a crash cut short
                shutil.rmtree(left)
            aside.mkdir(parents=True)
            items = {group: ocp.args.StandardSave(tree) for group, tree in copies.items()}
            self._checkpointer.save(aside / "arrays", args=ocp.args.Composite(**items))
        except Exception as error:
            self._failed(step, error)
            return
        self._pending = step, self._thread.submit(self._finish, step, aside, contents)

    def wait(self) -> None:
        """Until the save under way, if any, is on disk; reports it if it failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is not None:
            self._failed(step, error)

    def close(self) -> None:
        """Finish what is under way; no thread is left."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps that are there, whole or damaged, oldest first."""
        return steps(self.folder)

    def latest(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> Restored | None:
        """The newest good step, its arrays placed as the shardings in `like` say; None if there
        never was one.

        A damaged step is renamed aside with one warning, and the one before is used. Raises
        CheckpointError if steps are there but all are damaged, or if a good one holds other
        arrays than `like`.
        """
        held = self.steps()
        for step in reversed(held):
            folder = self.folder / str(step)
            try:
                artifacts.refuse_pickles(folder)
                artifacts.verify(folder)
                contents = read_contents(folder)
            except CheckpointError as error:
                aside = _set_aside(folder)
                self.on_warning(f"Checkpoint {step} was set aside as {aside.name}: {error}")
                continue
            return Restored(step, read_arrays(folder, like), contents["metadata"])
        if held or any(self.folder.glob("*.damaged*")):
            raise CheckpointError(
                f"Every checkpoint in {self.folder} is damaged: restore one from a copy, or remove "
                "the folder to begin anew."
            )
        return None

    def _finish(self, step: int, aside: pathlib.Path, contents: dict) -> None:
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        (aside / CONTENTS).write_text(json.dumps(contents), "utf-8")
        artifacts.write_manifest(aside)
        os.rename(aside, self.folder / str(step))
        artifacts.flush(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def _failed(self, step: int, error: BaseException) -> None:
        shutil.rmtree(self.folder / f"{_SAVING}{step}", ignore_errors=True)
        with contextlib.suppress(Exception):  # this one would report its error at the next save too
            self._checkpointer.close()
        self._checkpointer = _checkpointer()
        message = (
            f"Saving step {step} in {self.folder} failed ({_reason(error)}); earlier checkpoints "
            "are intact: free space or mend the folder."
        )
        if self.on_failure == "stop":
            raise CheckpointError(message) from error
        self.on_warning(message)


class RunLock:
    """Held while a process trains in a folder, which is made if need be; another one is refused.

    It is a lock of the operating system, so it ends with its process however that ends: a run that
    was killed goes on at once, on another host and under another process number too.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = pathlib.Path(folder) / LOCK

    def __enter__(self) -> "RunLock":
        if jax.process_index() != 0:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _locked(self.path)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self.path} ({error.strerror}): choose a run folder you can write."
            ) from error
        return self

    def __exit__(self, *_) -> None:
        if jax.process_index() == 0:
            self.path.unlink(missing_ok=True)
            self._file.close()


def _locked(path: pathlib.Path) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open while it is held)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"{path.parent} is in use by {holder}: wait for it, or stop it first."
            ) from None
        file.close()  # its holder removed it just now


def _checkpointer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs every error, with tracebacks, that it raises as well: `Checkpoints` reports it."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _reason(error: BaseException) -> str:
    """A few words: what the operating system said, if it is in there (tensorstore writes pages)."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return said[:200] or type(error).__name__


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    numbers = itertools.chain([""], itertools.count(2))
    names = (folder.with_name(f"{folder.name}.damaged{number}") for number in numbers)
    return folder.rename(next(aside for aside in names if not aside.exists()))
