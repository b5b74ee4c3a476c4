"""Token shards at rest: a zarr 3 group that tensorstore reads and writes, on a disk or in an object
store. Its attributes are written last, so that a group without them is an unfinished one.

    zarr.json      attributes["seqlab"]: a `Manifest`
    tokens/        uint16 or uint32 [tokens]: all documents, marks included, one after the other
    starts/        int64 [documents]: where each begins

Chunks carry a crc32c and a missing one is an error, so that damage never becomes tokens.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic
import tensorstore as ts
from pydantic.dataclasses import dataclass

from seqlab.errors import DataError

SHARD = 2**24  # tokens a file: written at once, held in memory meanwhile
CHUNK = 2**15  # tokens read at once: a row of any length touches few
CACHE = 2**28  # bytes of chunks kept in memory, over all shards
FAILURES = (ValueError, OSError, LookupError, NotImplementedError)  # what tensorstore raises


@dataclass(frozen=True)
class Manifest:
    """What a token array holds. `bytes` counts UTF-8 text without marks, `digest` is `Digest`'s,
    `tokenizer` the fingerprint of the tokenizer that made it."""

    tokenizer: str
    vocab: int
    tokens: int
    documents: int
    bytes: int
    digest: str
    version: Literal[1] = 1


class Digest:
    """sha256 over documents of token ids; the same for a text and for shards made of it."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def update(self, document: np.ndarray) -> None:
        self._hash.update(len(document).to_bytes(8, "little"))
        self._hash.update(document.astype("<u4").tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def token_dtype(vocab: int) -> np.dtype:
    """The smallest dtype in use that holds every id below `vocab`."""
    return np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)


class Reader:
    """Opens finished shards; `manifest`, `starts` [documents] int64, and `read`.

    Raises DataError where they are missing, unfinished, damaged, or not seqlab's.
    """

    def __init__(self, path: str):
        self.path = path
        self._folder = _folder(path)
        self.manifest = self._manifest()
        self._tokens = self._array("tokens", self.manifest.tokens)
        self.starts = self._read(
            [self._array("starts", self.manifest.documents)[ts.newaxis]], np.dtype(np.int64)
        )[0][0]
        steps = np.diff(self.starts, append=self.manifest.tokens)
        if not len(self.starts) or self.starts[0] != 0 or steps.min() < 1:
            raise self._damaged("its document starts are out of order")

    def read(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The int32 tokens of every span [start, stop), fetched side by side."""
        pieces = self._read([self._tokens[a:b] for a, b in spans], np.dtype(np.int32))
        for piece in pieces:
            if piece.max(initial=0) >= self.manifest.vocab or piece.min(initial=0) < 0:
                raise self._damaged(f"it holds ids outside its {self.manifest.vocab}")
        return pieces

    def _read(self, views: list[Any], dtype: np.dtype) -> list[np.ndarray]:
        try:
            return [future.result().astype(dtype) for future in [view.read() for view in views]]
        except FAILURES as error:
            raise self._damaged(_reason(error)) from error

    def _manifest(self) -> Manifest:
        content = _get(self._folder, "zarr.json", self.path)
        if content is None:
            begun = _get(self._folder, "tokens/zarr.json", self.path) is not None
            raise DataError(
                f"The token shards in {self.path!r} are unfinished: run seqlab tokenize again."
                if begun
                else f"There are no token shards in {self.path!r}: check the path, or write them "
                "with seqlab tokenize."
            )
        try:
            attributes = json.loads(content)["attributes"]["seqlab"]
            return pydantic.TypeAdapter(Manifest).validate_python(attributes)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"{self.path!r} is not a set of token shards that this version of seqlab wrote: "
                "make them with seqlab tokenize."
            ) from None

    def _array(self, name: str, length: int) -> Any:
        try:
            spec = {"driver": "zarr3", "fill_missing_data_reads": False}
            array = ts.open(spec, kvstore=self._folder / f"{name}/", context=_context()).result()
        except FAILURES as error:
            raise self._damaged(_reason(error)) from error
        if array.shape != (length,):
            raise self._damaged(f"{name} has shape {array.shape} where {(length,)} was promised")
        return array

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"The token shards in {self.path!r} are damaged ({reason}): "
            "restore them, or write them anew with seqlab tokenize."
        )


class Writer:
    """Writes documents one after the other and, in `finish`, the manifest that completes them.

    At most one shard of tokens is held in memory, and 8 bytes a document. Shards that were left
    unfinished are replaced; a folder that holds anything else is refused with a DataError.
    """

    def __init__(self, path: str, *, tokenizer: str, vocab: int):
        self.path, self._tokenizer, self._vocab = path, tokenizer, vocab
        self._folder = _folder(path)
        self._refuse_occupied()
        self._tokens = self._create("tokens", token_dtype(vocab))
        self._digest = Digest()
        self._waiting: list[np.ndarray] = []
        self._starts: list[int] = []
        self._written = self.tokens = self.bytes = 0

    @property
    def documents(self) -> int:
        return len(self._starts)

    def add(self, document: np.ndarray, text_bytes: int) -> None:
        """Append the ids of a document that `text_bytes` bytes of UTF-8 became."""
        if not len(document):
            return
        self._digest.update(document)
        self._starts.append(self.tokens)
        self._waiting.append(document)
        self.tokens += len(document)
        self.bytes += text_bytes
        if self.tokens - self._written >= SHARD:
            self._flush(whole=True)

    def finish(self) -> Manifest:
        self._flush(whole=False)
        starts = np.array(self._starts, np.int64)
        _append(self._create("starts", starts.dtype), starts, 0, self.path)
        manifest = Manifest(
            self._tokenizer,
            self._vocab,
            self.tokens,
            self.documents,
            self.bytes,
            self._digest.hexdigest(),
        )
        attributes = {"seqlab": pydantic.TypeAdapter(Manifest).dump_python(manifest)}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        try:
            self._folder.write("zarr.json", json.dumps(group).encode()).result()
        except FAILURES as error:
            raise _unwritten(self.path, error) from error
        return manifest

    def _flush(self, whole: bool) -> None:
        waiting = np.concatenate([*self._waiting, np.zeros(0, np.int32)])
        for start in range(0, len(waiting), SHARD):
            block = waiting[start : start + SHARD]
            if whole and len(block) < SHARD:
                self._waiting = [block]
                return
            self._tokens = _append(self._tokens, block, self._written, self.path)
            self._written += len(block)
        self._waiting = []

    def _refuse_occupied(self) -> None:
        try:
            names = self._folder.list().result()
        except FAILURES as error:
            raise _unwritten(self.path, error) from error
        if b"zarr.json" in names or (names and b"tokens/zarr.json" not in names):
            raise DataError(f"{self.path!r} is not empty: give a new folder, or remove it first.")

    def _create(self, name: str, dtype: np.dtype) -> Any:
        inner = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 3}},
            {"name": "crc32c"},
        ]
        sharded = {"chunk_shape": [CHUNK], "codecs": inner}
        spec = {
            "driver": "zarr3",
            "store_data_equal_to_fill_value": True,  # so that a missing chunk is a lost one
            "metadata": {
                "data_type": dtype.name,
                "shape": [0],
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
            },
        }
        where = self._folder / f"{name}/"
        try:
            return ts.open(
                spec, kvstore=where, create=True, delete_existing=True, context=_context()
            ).result()
        except FAILURES as error:
            raise _unwritten(self.path, error) from error


@functools.cache
def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE}})


def _folder(path: str) -> ts.KvStore:
    """The folder or URL as a key-value store."""
    slashed = path.rstrip("/") + "/"
    local = {"driver": "file", "path": f"{pathlib.Path(path).expanduser().absolute()}/"}
    try:
        return ts.KvStore.open(slashed if "://" in path else local, context=_context()).result()
    except FAILURES as error:
        raise DataError(
            f"{path!r} is not a place that tensorstore can open ({_reason(error)}): "
            "give a folder, or a URL such as gs://bucket/folder."
        ) from error


def _get(folder: ts.KvStore, name: str, path: str) -> bytes | None:
    """The content of a key; None where there is none."""
    try:
        found = folder.read(name).result()
    except FAILURES as error:
        raise DataError(f"{path!r} cannot be read: {_reason(error)}.") from error
    return found.value if found.state == "value" else None


def _append(array: Any, block: np.ndarray, start: int, path: str) -> Any:
    try:
        array = array.resize(exclusive_max=[start + len(block)]).result()
        array[start:].write(block.astype(array.dtype.numpy_dtype)).result()
    except FAILURES as error:
        raise _unwritten(path, error) from error
    return array


def _unwritten(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path!r} cannot be written ({_reason(error)}): give a folder with room that is yours."
    )


def _reason(error: Exception) -> str:
    """The first part of tensorstore's message, which goes on with a whole specification."""
    return str(error).split(" [")[0].splitlines()[0][:300].rstrip(".")
