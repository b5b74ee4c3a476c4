"""Where documents come from: text files, JSON lines, token shards. Held-out documents are chosen by
a hash of a file's name (of its text for JSON lines), so that no run and no machine disagrees."""

import glob
import hashlib
import itertools
import json
import math
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from seqlab.errors import DataError, nearest
from seqlab.settings import STRICT

STDLIB = "python:stdlib"
#: Not sources of the library proper: what was installed into it, test suites (some systems lack
#: them) and generated texts.
_FOREIGN = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
TOGETHER = 2**20  # characters that a tokenizer gets at once, to work on in parallel
Part = Literal["train", "held_out", "all"]


@dataclass(frozen=True, config=STRICT)
class Text:
    """UTF-8 files, a document each, named by path or by pattern (`**` goes into folders).

    files: paths and patterns, or "python:stdlib": the source files of Python's standard library,
        without its tests.
    part: "held_out" is the share `held_out` of the files, chosen by sha256 of each name relative
        to the fixed part of its pattern; "train" is the rest; "all" is both.
    weight: share of the rows, relative to the weights of the other sources.
    name: keys the position in checkpoints; the files by default.
    """

    files: tuple[str, ...]
    held_out: float = 0.0
    part: Part = "all"
    weight: float = 1.0
    name: str = ""
    kind: Literal["text"] = "text"

    def __post_init__(self):
        _complete(self, ", ".join(self.files))


@dataclass(frozen=True, config=STRICT)
class Jsonl:
    """Files of JSON lines, an object each whose `field` is a document; otherwise as `Text`.

    The split goes by sha256 of the document, so that duplicates stay on one side.
    """

    files: tuple[str, ...]
    field: str = "text"
    held_out: float = 0.0
    part: Part = "all"
    weight: float = 1.0
    name: str = ""
    kind: Literal["jsonl"] = "jsonl"

    def __post_init__(self):
        _complete(self, ", ".join(self.files))


@dataclass(frozen=True, config=STRICT)
class Tokens:
    """Token shards that `seqlab tokenize` wrote: a folder, or a URL of an object store that
    tensorstore speaks (gs://, s3://, file://, memory://). They are read row by row."""

    path: str
    weight: float = 1.0
    name: str = ""
    kind: Literal["tokens"] = "tokens"

    def __post_init__(self):
        _complete(self, self.path.rstrip("/").rsplit("/", 1)[-1])


Source = Annotated[Text | Jsonl | Tokens, Field(discriminator="kind")]


class Documents:
    """The documents of a `Text` or `Jsonl`, in a fixed order; iterate as often as needed.

    skipped: after an iteration, how many files were passed over, by reason.
    Raises DataError, naming file and line, where something cannot be read as promised.
    """

    def __init__(self, source: Text | Jsonl):
        self.source = source
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[str]:
        self.skipped = {}
        source, found = self.source, False
        read = self._files if isinstance(source, Text) else self._lines
        for document in read():
            found = True
            yield document
        if not found:
            raise DataError(_nothing(source))

    def groups(self) -> Iterator[list[str]]:
        """The documents in lists of about `TOGETHER` characters."""
        group, size = [], 0
        for text in self:
            group.append(text)
            size += len(text)
            if size >= TOGETHER:
                yield group
                group, size = [], 0
        if group:
            yield group

    def notes(self) -> list[str]:
        """A sentence for each reason for which files were skipped."""
        return [
            f"{self.source.name}: {count} files were skipped because they are {reason}."
            for reason, count in self.skipped.items()
        ]

    def _files(self) -> Iterator[str]:
        for name, path, pattern in _listed(self.source.files):
            if not _chosen(self.source, name):
                continue
            try:
                text = _text(path)
            except DataError:
                if pattern != STDLIB:
                    raise
                # The library tests its own decoder with files of other encodings.
                self._skip("not UTF-8")
                continue
            if text:
                yield text
            elif pattern == STDLIB or glob.has_magic(pattern):
                self._skip("empty")
            else:
                raise DataError(f"{path} is empty: give a file that holds text.")

    def _lines(self) -> Iterator[str]:
        assert isinstance(self.source, Jsonl)
        for _, path, _ in _listed(self.source.files):
            for number, line in enumerate(_file_lines(path), 1):
                if line.strip():
                    text = _field(line, self.source.field, f"{path}, line {number}")
                    if text and _chosen(self.source, text):
                        yield text

    def _skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def _complete(source: Any, name: str) -> None:
    """Fill in the default name; refuse weights and shares that make no sense."""
    object.__setattr__(source, "name", source.name or name)
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise DataError(
            f"The weight of source {source.name!r} is {source.weight}: give a number above 0, "
            "or leave the source out."
        )
    if not 0 <= getattr(source, "held_out", 0) < 1:
        raise DataError(
            f"held_out of source {source.name!r} is {source.held_out}: give a share from 0 up to, "
            "but not including, 1."
        )
    if not getattr(source, "files", source.name):
        raise DataError("A source names no files: give at least one path or pattern.")


def _chosen(source: Text | Jsonl, key: str) -> bool:
    if source.part == "all":
        return True
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return (number < source.held_out * 2**64) == (source.part == "held_out")


def _nothing(source: Text | Jsonl) -> str:
    remedy = "give other files"
    if source.part != "all":
        remedy += f", or change held_out={source.held_out} or part={source.part!r}"
    return f"Source {source.name!r} holds no document: {remedy}."


def _listed(patterns: tuple[str, ...]) -> Iterator[tuple[str, pathlib.Path, str]]:
    """(name relative to the root, path, pattern) of every file, each once, in a fixed order."""
    seen = set()
    for pattern in patterns:
        root, paths = _matches(pattern)
        for path in sorted(paths):
            if path not in seen:
                seen.add(path)
                yield path.relative_to(root).as_posix(), path, pattern


def _matches(pattern: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The folder that a pattern's names are relative to, and the files that it names."""
    if pattern == STDLIB:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        return root, [
            p for p in root.rglob("*.py") if not _FOREIGN & set(p.relative_to(root).parts)
        ]
    if pattern.startswith("python:"):
        raise DataError(f"There is no text set {pattern!r}: {nearest(pattern, [STDLIB])}")
    path = pathlib.Path(pattern).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        raise DataError(f"{pattern!r} is a folder: give a pattern such as '{path}/**/*.txt'.")
    if not glob.has_magic(pattern):
        raise DataError(f"There is no file {pattern!r}: check the path.")
    files = [p for p in map(pathlib.Path, glob.glob(str(path), recursive=True)) if p.is_file()]
    if not files:
        raise DataError(f"No file matches {pattern!r}: check the pattern.")
    return pathlib.Path(*itertools.takewhile(lambda p: not glob.has_magic(p), path.parts)), files


def _file_lines(path: pathlib.Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check that it is there and yours to read."
        ) from None


def _text(path: pathlib.Path) -> str:
    try:
        return b"".join(_file_lines(path)).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv."
        ) from None


def _field(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not JSON in UTF-8: repair or remove the line.") from None
    if not isinstance(record, dict) or field not in record:
        known = nearest(field, map(str, record)) if isinstance(record, dict) and record else ""
        raise DataError(f"{where} has no field {field!r}: {known or 'give objects that have it.'}")
    if not isinstance(record[field], str):
        raise DataError(f"{where}: field {field!r} is not text: name another field.")
    return record[field]
