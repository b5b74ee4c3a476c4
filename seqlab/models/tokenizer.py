"""Text to token ids and back: bytes, built in, or any `tokenizer.json` through the extra `hf`."""

import codecs
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from seqlab.errors import DataError, ModelError

LARGEST_FILE = 50 * 2**20  # bytes of a tokenizer.json; the largest public ones are near 35 MB
MARK = 256  # of bytes
LONGEST_PENDING = 8  # ids; a UTF-8 character is at most 4 bytes, hence at most 4 ids
END_MARKS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>")
START_MARKS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<BOS>")


class Stream(Protocol):
    """Decodes ids as they come; what it has returned is never taken back."""

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete; bytes of an unfinished one wait."""
        ...

    def flush(self) -> str:
        """What still waits, an unfinished character as U+FFFD; the stream starts afresh."""
        ...


class Tokenizer(Protocol):
    """Text <-> ids in [0, vocab). `stop` is the document mark, None where there is none; `start`
    stands before a document and before a prompt, and each of `stops` ends what a model writes;
    `fingerprint` is the sha256 of all that decides the ids."""

    vocab: int
    stop: int | None
    start: tuple[int, ...]
    stops: tuple[int, ...]
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone, without marks. Text can never spell a mark."""
        ...

    def document(self, text: str) -> np.ndarray:
        """[N] int32: the ids of a whole document, `start` before and the mark after them."""
        ...

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`document` of each text, in parallel where the tokenizer can."""
        ...

    def prompt(self, text: str) -> list[int]:
        """What generation starts from: `start`, then the text's ids."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, marks left out, bytes that are not UTF-8 as U+FFFD."""
        ...

    def stream(self) -> Stream:
        """A fresh streaming decoder."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """'bytes', or the path of a tokenizer.json, or of a folder that holds one, and what a published
    model's folder has beside it to say what begins and ends a text.

    Raises ModelError where the file is missing, malformed or larger than 50 MB.
    """
    if spec == "bytes":
        return ByteTokenizer()
    from seqlab.models import published_tokenizer  # which builds on this file

    path = pathlib.Path(spec)
    published = path.is_dir() and published_tokenizer.belongs(path)
    return published_tokenizer.PublishedTokenizer(path) if published else FileTokenizer(path)


class ByteTokenizer:
    """The 256 bytes of UTF-8, and id 256: the mark at both ends of every document."""

    vocab: int = 257
    stop: int | None = MARK
    start: tuple[int, ...] = (MARK,)
    stops: tuple[int, ...] = (MARK,)
    fingerprint = hashlib.sha256(b"utf-8 bytes; 256 marks both ends of a document").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def document(self, text: str) -> np.ndarray:
        text_bytes = np.frombuffer(_utf8(text), np.uint8)
        return np.pad(text_bytes.astype(np.int32), 1, constant_values=MARK)

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.document(text) for text in texts]

    def prompt(self, text: str) -> list[int]:
        return [MARK, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return _bytes(ids).decode(errors="replace")

    def stream(self) -> "ByteStream":
        return ByteStream()


class ByteStream:
    """Streams bytes through the standard library's incremental UTF-8 decoder."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(_bytes(ids))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class FileTokenizer:
    """A tokenizer.json, run by the `tokenizers` package; its end (or start) token is the mark."""

    def __init__(self, path: pathlib.Path):
        path = path / "tokenizer.json" if path.is_dir() else path
        content = _read(path)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._tokenizer = _parse(content, path)
        special = {
            token.content: i
            for i, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        marks = [special[name] for name in (*END_MARKS, *START_MARKS) if name in special]
        self.stop: int | None = marks[0] if marks else None
        self.start: tuple[int, ...] = tuple(marks[:1])
        self.stops: tuple[int, ...] = self.start
        self.vocab = 1 + max(self._tokenizer.get_vocab(True).values(), default=-1)
        if not self.vocab:
            raise ModelError(f"{path} has an empty vocabulary: train the tokenizer first.")

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def document(self, text: str) -> np.ndarray:
        return self.documents([text])[0]

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            _utf8(text)
        end = [] if self.stop is None else [self.stop]
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*self.start, *e.ids, *end], np.int32) for e in encoded]

    def prompt(self, text: str) -> list[int]:
        return [*self.start, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_ids(ids), skip_special_tokens=True)

    def stream(self) -> "FileStream":
        return FileStream(self)


class FileStream:
    """Streams ids whose text depends on their left neighbours.

    New text is what the last piece and the pending ids decode to beyond the last piece alone. It
    is held back while it ends in U+FFFD, which an unfinished character decodes to, but never for
    more than `LONGEST_PENDING` ids, so that garbage cannot stall the stream.
    """

    def __init__(self, tokenizer: FileTokenizer):
        self._decode = tokenizer.decode
        self._last: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        return "".join(self._one(i) for i in _ids(ids))

    def flush(self) -> str:
        rest = self._emit(self._text())
        self._last = []
        return rest

    def _one(self, i: int) -> str:
        self._pending.append(i)
        text = self._text()
        waits = text.endswith("\ufffd") and len(self._pending) < LONGEST_PENDING
        return "" if waits else self._emit(text)

    def _text(self) -> str:
        return self._decode(self._last + self._pending)[len(self._decode(self._last)) :]

    def _emit(self, text: str) -> str:
        # Ids without text (marks) leave the neighbours standing that spacing depends on.
        neighbours = self._pending if text else self._last + self._pending
        self._last, self._pending = neighbours[-LONGEST_PENDING:], []
        return text


def _ids(ids: Iterable[int]) -> list[int]:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).ravel().tolist()


def _bytes(ids: Iterable[int]) -> bytes:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).ravel()
    return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text holds half a UTF-16 pair ({text[error.start]!r} at character "
            f"{error.start}), which UTF-8 cannot express: repair the text."
        ) from None


def _read(path: pathlib.Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ModelError(
                f"{path} is {size / 2**20:.0f} MB, and a tokenizer.json may be 50 MB at most: "
                "check that it is the right file."
            )
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"The tokenizer {str(path)!r} cannot be read ({error.strerror}): "
            "give 'bytes' or the path of a tokenizer.json."
        ) from None


def _parse(content: bytes, path: pathlib.Path) -> Any:
    try:
        from tokenizers import Tokenizer as Rust
    except ImportError:
        raise ModelError(
            f"Reading {path} needs the package tokenizers: pip install 'seqlab[hf]'."
        ) from None
    try:
        if not isinstance(json.loads(content), dict):
            raise ValueError("not a JSON object")
        tokenizer = Rust.from_str(content.decode())
    except Exception as error:  # the package raises bare Exception on what it cannot read
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path} is not a tokenizer.json that the tokenizers package can read ({reason}): "
            "save it again with Tokenizer.save."
        ) from None
    # A file may ask for truncation and padding, which would silently cut and fill documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # '<|endoftext|>' in a text is text, not the mark
    return tokenizer
