"""Rows of whole documents, grouped so that all rows have like work and so have the devices that
share a row; where `corpus` cuts the text into windows wherever they end.

Which documents make a row follows from the seed and the lengths alone. Every document is in one row
of an epoch; one that is longer than a row is cut in pieces that overlap by the token they predict.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from seqlab.parallel.packing import balanced
from seqlab.train.corpus import Batch, Corpus

POOL = 64  # rows filled together: more are more alike, fewer mix documents less


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped(Corpus):
    """A corpus whose rows, of one length, hold whole documents.

    spans [pieces, 2]: tokens [start, stop) of each, row after row; first [rows + 1]: the first
    piece of each row. shards: devices to balance softmax attention over.
    """

    spans: np.ndarray
    first: np.ndarray
    shards: int

    def rows(self, length: int) -> int:
        """Rows in an epoch; each may end in padding."""
        return len(self.first) - 1

    def batch(self, indices: Sequence[int], length: int) -> Batch:
        """Rows by index, their documents in an order that balances the work of the devices."""
        laid = [self._laid(row, length) for row in indices]
        pieces = iter(self.read([(a, b) for spans in laid for a, b in spans.tolist()]))
        batch = Batch(*np.zeros((2, len(laid), length + 1), np.int32))
        for row, spans in enumerate(laid):
            end = 0
            for segment in range(len(spans)):
                piece = next(pieces)
                place = row, slice(end, end + len(piece))
                batch.tokens[place], batch.segment_ids[place] = piece, segment + 1
                end += len(piece)
        return batch

    def _laid(self, row: int, length: int) -> np.ndarray:
        spans = self.spans[self.first[row] : self.first[row + 1]]
        return spans[balanced(spans[:, 1] - spans[:, 0], length, self.shards, seed=row)]


def grouped(corpus: Corpus, length: int, shards: int, seed: int) -> Grouped:
    """The same documents in rows of `length`, to be shared by so many devices.

    It takes some microseconds a document, and 16 bytes.
    """
    pieces = _pieces(corpus, length)
    pieces = pieces[np.random.RandomState(seed % 2**32).permutation(len(pieces))]
    rows = _rows(pieces, length + 1)
    fields = {field.name: getattr(corpus, field.name) for field in dataclasses.fields(corpus)}
    return Grouped(
        **fields,
        spans=pieces[np.concatenate(rows)],
        first=np.cumsum([0, *map(len, rows)]),
        shards=shards,
    )


def _pieces(corpus: Corpus, length: int) -> np.ndarray:
    """[pieces, 2]: documents, cut every `length` tokens with the next token to predict."""
    ends = np.append(corpus.starts[1:], corpus.tokens)
    counts = np.maximum(1, -(-(ends - corpus.starts - 1) // length))
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(corpus.starts, counts) + within * length
    return np.stack([begins, np.minimum(begins + length + 1, np.repeat(ends, counts))], axis=1)


def _rows(pieces: np.ndarray, room: int) -> list[list[int]]:
    """Which pieces go in each row: pools of rows are filled, the longest pieces first, each going
    where the squares of lengths add up to least; what finds no room waits for the next pool."""
    sizes = pieces[:, 1] - pieces[:, 0]
    full = np.arange(POOL * room, sizes.sum(), POOL * room)
    pools = np.split(np.arange(len(sizes)), np.searchsorted(np.cumsum(sizes), full))
    rows, waiting = [], []
    while pools or waiting:
        pool = [*waiting, *(pools.pop(0) if pools else [])]
        filled, waiting = _fill(np.array(pool, np.int64), sizes, room)
        rows += filled
    return rows


def _fill(pool: np.ndarray, sizes: np.ndarray, room: int) -> tuple[list[list[int]], list[int]]:
    """Rows of pieces, and the pieces left over."""
    count = max(1, int(sizes[pool].sum()) // room)
    rows: list[list[int]] = [[] for _ in range(count)]
    held, squares, left = np.zeros(count, np.int64), np.zeros(count), []
    for piece in pool[np.argsort(-sizes[pool], kind="stable")].tolist():
        size = int(sizes[piece])
        best = int(np.argmin(np.where(held + size <= room, squares, np.inf)))
        if held[best] + size > room:
            left.append(piece)
            continue
        rows[best].append(piece)
        held[best] += size
        squares[best] += size * size
    return rows, left
