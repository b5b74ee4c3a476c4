"""The run folder: which run it holds, and whether this config may go on with it."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from seqlab import settings
from seqlab.errors import CheckpointError, ConfigError
from seqlab.models import published_tokenizer
from seqlab.models.published_tokenizer import TOKENIZER
from seqlab.train import lock, watchdog
from seqlab.train.config import MAY_CHANGE, Config

FORMAT = 1
_OURS = {lock.FILE, watchdog.FOLDER}  # what a start that failed may leave


def describe(config: Config, record: Mapping[str, Any] | None = None) -> dict:
    """config.json: the model and its tokenizer where every saved model has them, then the run, with
    the record of its work (see `train.work`)."""
    run = settings.plain(config) | dict(record or {})
    model = run.pop("model")
    return {"format": FORMAT, "model": model, "tokenizer": config.data.tokenizer, "run": run}


def check(folder: pathlib.Path, config: Config, record: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError unless the folder is free or holds this very run; the first field that
    differs is named."""
    path = folder / "config.json"
    if path.exists():
        _same_run(folder, _read(path), describe(config, record))
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: choose another path for the run.")
    elif folder.is_dir() and any(inside.name not in _OURS for inside in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another folder.")


def write(folder: pathlib.Path, config: Config, record: Mapping[str, Any] | None = None) -> None:
    """Write config.json and the run's own copy of a tokenizer.json; what was there is replaced."""
    if config.data.tokenizer != "bytes":
        source = pathlib.Path(config.data.tokenizer)
        with _writing(folder / TOKENIZER):
            if source.is_dir():
                published_tokenizer.copy(source, folder)
            else:
                shutil.copyfile(source, folder / TOKENIZER)
    put(folder / "config.json", json.dumps(describe(config, record), indent=1) + "\n")


def put(path: pathlib.Path, text: str) -> None:
    """Write a file, its folder too: a reader sees the old text or the new one. Raises ConfigError
    where it cannot be written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        os.replace(part, path)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path} ({error.strerror}): choose a folder (--out) you can write."
        ) from error


def set_rows_aside(folder: pathlib.Path) -> str | None:
    """Rename the metrics of a run that left no checkpoint, so that none are overwritten; returns
    their new name."""
    rows, aside = folder / "metrics.jsonl", folder / "metrics.jsonl.old"
    if not rows.exists() or rows.stat().st_size == 0:
        return None
    return rows.replace(aside).name


def _read(path: pathlib.Path) -> dict:
    try:
        then = json.loads(path.read_text("utf-8"))
    except ValueError:
        then = None
    if isinstance(then, dict) and then.get("format") == FORMAT and "run" not in then:
        raise ConfigError(
            f"{path.parent} is a saved model, which no run can go on from: give the run another "
            "folder (--out)."
        )
    if not isinstance(then, dict) or (then.get("format"), type(then.get("run"))) != (FORMAT, dict):
        raise CheckpointError(
            f"{path} is damaged or of another version of seqlab: restore it, or start another run."
        )
    return then


def _same_run(folder: pathlib.Path, then: dict, now: dict) -> None:
    then, now = ({**d, "run": {**d["run"], **dict.fromkeys(MAY_CHANGE)}} for d in (then, now))
    different = difference(then, now)
    if different:
        name, was, is_now = different
        raise ConfigError(
            f"{folder} holds a run that differs in {name} (was {was}, is {is_now}): give the run "
            "another folder (--out), or remove that one."
        )


def difference(one, other, name: str = "") -> tuple[str, str, str] | None:
    """('a.b', '1', '2') of the first field in which two descriptions differ, or None."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(key, one.get(key), other.get(key)) for key in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(i, *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    elif one == other:
        return None
    else:
        name = name.removeprefix(".").removeprefix("run.")
        return name, json.dumps(one), json.dumps(other)
    found = (difference(a, b, f"{name}.{key}") for key, a, b in pairs)
    return next(filter(None, found), None)
