"""Checkpoints that are whole or absent: written aside, hashed, renamed; verified before use."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp

from seqlab.errors import CheckpointError, ConfigError
from seqlab.models import artifacts
from seqlab.models.arrays import CONTENTS, describe, groups, read_arrays, read_contents

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
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
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
            shutil.rmtree(aside, ignore_errors=True)
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
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def latest(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> Restored | None:
        """The newest good step, its arrays placed as the shardings in `like` say; None if there
        never was one.

        A damaged step is renamed aside with one warning, and the one before is used. Raises
        CheckpointError if steps are there but all are damaged, or if a good one holds other
        arrays than `like`.
        """
        steps = self.steps()
        for step in reversed(steps):
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
        if steps or self._damaged():
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
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)
        for left in self.folder.glob(f"{_SAVING}*"):  # of saves that a crash cut short
            shutil.rmtree(left, ignore_errors=True)

    def _failed(self, step: int, error: BaseException) -> None:
        shutil.rmtree(self.folder / f"{_SAVING}{step}", ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0:1] or type(error)
        message = (
            f"Saving step {step} in {self.folder} failed ({reason}); earlier checkpoints are "
            "intact: free space or mend the folder."
        )
        if self.on_failure == "stop":
            raise CheckpointError(message) from error
        self.on_warning(message)

    def _damaged(self) -> bool:
        return self.folder.is_dir() and any(self.folder.glob("*.damaged*"))


class RunLock:
    """Held while a process trains in a folder; another one is refused."""

    def __init__(self, folder: str | os.PathLike):
        self.path = pathlib.Path(folder) / "lock.json"

    def __enter__(self) -> "RunLock":
        if jax.process_index() != 0:
            return self
        mine = {"pid": os.getpid(), "host": socket.gethostname()}
        try:
            holder = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            holder = None
        if isinstance(holder, dict) and holder != mine and _alive(holder):
            raise ConfigError(
                f"{self.path.parent} is in use by process {holder.get('pid')} on "
                f"{holder.get('host')}: wait for it, or stop it first."
            )
        self.path.write_text(json.dumps(mine), "utf-8")
        return self

    def __exit__(self, *_) -> None:
        if jax.process_index() == 0:
            self.path.unlink(missing_ok=True)


def _alive(holder: dict) -> bool:
    """Whether the process that took a lock may still run; one on another host may."""
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except (KeyError, TypeError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    number, aside = 1, folder.with_name(folder.name + ".damaged")
    while aside.exists():
        number, aside = number + 1, folder.with_name(f"{folder.name}.damaged{number}")
    return folder.rename(aside)
