"""One run at a time trains in a folder; of many processes the first holds its lock."""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
from typing import IO

from seqlab.errors import ConfigError
from seqlab.parallel import processes

FILE = "lock.json"


class InUse(ConfigError):
    """Another process has the folder."""


class RunLock:
    """Held while a run trains in a folder, which is made if need be; another one is refused
    with InUse.

    The operating system holds the lock and drops it with the process, however it dies, so a lock
    is never stale; the file says who holds it. Where the file system knows no locks, there is
    none: it guards against a slip, and refusing to train would be worse.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = pathlib.Path(folder) / FILE
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        processes.once(self._take)
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            _write(self._file, {})  # the file stays: a lock may just have been taken on it
            self._file.close()

    def _take(self) -> None:
        file = self._open()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise InUse(
                f"{self.path.parent} is in use by {holder}: wait for it, or stop it first."
            ) from None
        except OSError as error:  # a file system without locks: train all the same
            logging.getLogger(__name__).debug("%s cannot be locked: %s", self.path, error)
        _write(file, {"pid": os.getpid(), "host": socket.gethostname()})
        self._file = file

    def _open(self) -> IO[str]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self.path} ({error.strerror}): choose a run folder you can write."
            ) from error


def _write(file: IO[str], holder: dict) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its label
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
