"""metrics.jsonl: what happened at each step, one JSON object a line, whole after any crash.

A training step's row holds `step`, `loss` (nats per token), `bits_per_byte`, `lr`, `grad_norm`,
`tokens` (seen in total), `tokens_per_second`, `data_wait` (fraction of the step's wall time spent
waiting for data) and `seconds` (since this process began to train), and what layers add to the
loss, each by its name (such as `load_balance`). An evaluation's row holds `step`, `held_out_loss`
and `held_out_bits_per_byte`. Where a run has work of another kind (`train.work`), `loss` is its own
measure, without bits per byte, and what its losses see is logged beside it; `held_out_loss` is in
nats per token all the same. NaN and infinities are not JSON: they are written as null.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqlab.errors import ConfigError, DataError


class MetricsFile:
    """A sink that appends rows to a file; a row is in the file, whole, when `log` returns.

    Opening a file drops the unfinished line that a crash can leave at its end. Raises ConfigError
    when it cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self.path} ({error.strerror}): choose a run folder you can write."
            ) from error
        self._cut(self.path.read_bytes().rfind(b"\n") + 1)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Append one row. Raises OSError when it cannot be written; the file then stays whole."""
        line = json.dumps(_jsonable({"step": step, **row}), allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._cut(self._end)
            raise
        self._end += len(line)

    def truncate_after(self, step: int) -> None:
        """Drop the first row beyond `step` and all that follows it: a run that resumes from a
        checkpoint of `step` writes those rows again."""
        end = 0
        with open(self.path, "rb") as lines:
            for line in lines:
                row = _row(line)
                if row is not None and row["step"] > step:
                    break
                end += len(line)
        self._cut(end)

    def sync(self) -> None:
        """Return once every row is on the disk itself: to be called before a checkpoint stands."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._end = end


def read(path: str | os.PathLike) -> list[dict]:
    """All rows of a metrics file, in the order written; a damaged line is left out.

    Raises DataError when the file cannot be read.
    """
    try:
        with open(path, "rb") as lines:
            return [row for row in map(_row, lines) if row is not None]
    except OSError as error:
        raise DataError(
            f"Cannot read the metrics {path} ({error.strerror}): give the path of a run."
        ) from error


def _row(line: bytes) -> dict | None:
    """The row that a whole line holds, else None."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # not JSON, or not UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _jsonable(value: Any) -> Any:
    """Scalars of numpy and jax as Python's; what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
