"""A source as one long row of tokens, cut into windows that overlap by the token they predict."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from seqlab.errors import DataError
from seqlab.models.tokenizer import Tokenizer
from seqlab.train.shards import Digest, Reader, token_dtype
from seqlab.train.sources import Documents, Source, Tokens

Span = tuple[int, int]
Row = tuple[int, int]  # (source, window of its corpus); source -1 is padding


class Batch(NamedTuple):
    """Rows of packed documents. Position t predicts t + 1 where both have the same segment id."""

    tokens: np.ndarray  # [B, length + 1] int32
    segment_ids: np.ndarray  # [B, length + 1] int32: 1.. for each document of the row, 0 = padding


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of a source, one after the other; fixed by `digest`.

    tokens: how many, marks included. bytes: of UTF-8 text, marks not counted.
    starts: [documents] int64. read: the int32 tokens of every span [start, stop) asked for.
    """

    source: Source
    tokens: int
    bytes: int
    digest: str
    starts: np.ndarray
    read: Callable[[Sequence[Span]], list[np.ndarray]]
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all but the first of each document."""
        return self.tokens - len(self.starts)

    def rows(self, length: int) -> int:
        """Windows in the corpus; only the last may be padded."""
        return -(-(self.tokens - 1) // length)

    def batch(self, indices: Sequence[int], length: int) -> Batch:
        """Windows by index: window i covers tokens [i * length, i * length + length]."""
        begins = np.asarray(indices, np.int64)[:, None] * length
        places = begins + np.arange(length + 1)  # [B, length + 1]
        document = np.searchsorted(self.starts, places, side="right")
        segment_ids = np.where(places < self.tokens, document - document[:, :1] + 1, 0)
        tokens = np.zeros(places.shape, np.int32)
        spans = [(a, min(a + length + 1, self.tokens)) for a in begins[:, 0].tolist()]
        for row, piece in zip(tokens, self.read(spans), strict=True):
            row[: len(piece)] = piece
        return Batch(tokens, segment_ids.astype(np.int32))


def open_corpus(source: Source, tokenizer: Tokenizer) -> Corpus:
    """Text is tokenized into memory (2 or 4 bytes a token); shards are read as rows ask for them.

    Raises DataError where there is nothing to read, or the shards are another tokenizer's.
    """
    if isinstance(source, Tokens):
        corpus = _from_shards(source, tokenizer)
    else:
        corpus = _from_documents(Documents(source), tokenizer)
    if corpus.targets < 1:
        raise DataError(f"Source {source.name!r} holds no token to predict: give longer text.")
    return corpus


def gather(corpora: list[Corpus], rows: list[Row], length: int) -> Batch:
    """Rows of several corpora, in the order given."""
    batch = Batch(*np.zeros((2, len(rows), length + 1), np.int32))
    for source, corpus in enumerate(corpora):
        where = [i for i, (s, _) in enumerate(rows) if s == source]
        if where:
            part = corpus.batch([rows[i][1] for i in where], length)
            batch.tokens[where], batch.segment_ids[where] = part
    return batch


def _from_shards(source: Tokens, tokenizer: Tokenizer) -> Corpus:
    reader = Reader(source.path)
    held = reader.manifest
    if held.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"The token shards in {source.path!r} were made with another tokenizer (of "
            f"{held.vocab} ids, the configured one has {tokenizer.vocab}): configure that one, or "
            "write them anew with seqlab tokenize."
        )
    return Corpus(source, held.tokens, held.bytes, held.digest, reader.starts, reader.read)


def _from_documents(documents: Documents, tokenizer: Tokenizer) -> Corpus:
    dtype, digest, pieces, text_bytes = token_dtype(tokenizer.vocab), Digest(), [], 0
    for texts in documents.groups():
        for text, ids in zip(texts, tokenizer.documents(texts), strict=True):
            if len(ids):
                digest.update(ids)
                pieces.append(ids.astype(dtype))
                text_bytes += len(text.encode())
    lengths = np.array([0, *map(len, pieces)], np.int64)
    tokens = np.concatenate([np.zeros(0, dtype), *pieces])
    return Corpus(
        documents.source,
        len(tokens),
        text_bytes,
        digest.hexdigest(),
        np.cumsum(lengths)[:-1],
        lambda spans: [tokens[a:b].astype(np.int32) for a, b in spans],
        tuple(documents.notes()),
    )
