"""One process at a time trains in a folder."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket

import jax

from seqlab.errors import ConfigError


class RunLock:
    """Held while a process trains in a folder; another one is refused with ConfigError.

    The operating system holds the lock and drops it with the process, however it dies, so a lock
    is never stale; the file says who holds it. Where the file system knows no locks, there is
    none: it guards against a slip, and refusing to train would be worse.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = pathlib.Path(folder) / "lock.json"
        self._file = None

    def __enter__(self) -> "RunLock":
        if jax.process_index() == 0:
            self._file = open(self.path, "a+", encoding="utf-8")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = self._holder()
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    self._file.close()
                    raise ConfigError(
                        f"{self.path.parent} is in use by {holder}: wait for it, or stop it first."
                    ) from None
            self._say({"pid": os.getpid(), "host": socket.gethostname()})
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._say({})  # the file stays: removing it could free a lock that was just taken
            self._file.close()

    def _say(self, holder: dict) -> None:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its label
            self._file.truncate(0)
            self._file.write(json.dumps(holder) + "\n")
            self._file.flush()

    def _holder(self) -> str:
        try:
            self._file.seek(0)
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
