"""Text kept from training, read the same way every time, to measure bits per byte on."""

import math
from collections.abc import Iterator, Sequence

from seqlab.models.tokenizer import Tokenizer, load_tokenizer
from seqlab.train.corpus import Batch, Corpus, Row, gather, open_corpus
from seqlab.train.data import Data
from seqlab.train.sources import Documents, Source, Tokens


class HeldOut:
    """The same batches every time, in order; the last one is filled up with padding rows.

    bytes_per_token: bytes of text per predicted token, for bits per byte. notes: as a `Loader`'s.
    """

    def __init__(self, corpora: list[Corpus], rows: list[Row], data: Data, mine: Sequence[int]):
        self._corpora, self._rows, self._data, self._mine = corpora, rows, data, mine
        targets = sum(c.targets for c in corpora)
        self.bytes_per_token = sum(c.bytes for c in corpora) / targets if targets else math.nan
        self.notes = tuple(note for c in corpora for note in c.notes)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._data.batch)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            rows = self._rows[i * self._data.batch : (i + 1) * self._data.batch]
            rows = [*rows, *[(-1, 0)] * (self._data.batch - len(rows))]
            yield gather(self._corpora, [rows[i] for i in self._mine], self._data.length)


def held_out_batches(
    data: Data, tokenizer: Tokenizer, *, rows: Sequence[int] | None = None
) -> HeldOut:
    """Batches of `data.held_out`, of each the given rows or all; without sources there are none."""
    mine = range(data.batch) if rows is None else rows
    corpora = [open_corpus(source, tokenizer) for source in data.held_out]
    every = [(s, row) for s, c in enumerate(corpora) for row in range(c.rows(data.length))]
    kept = min(data.held_out_rows or len(every), len(every))
    return HeldOut(corpora, [every[i * len(every) // kept] for i in range(kept)], data, mine)


def held_out_text(data: Data) -> bytes:
    """All held-out text in UTF-8, to see what a plain compressor makes of it."""
    tokenizer = load_tokenizer(data.tokenizer)
    return b"".join(t.encode() for source in data.held_out for t in _texts(source, tokenizer))


def _texts(source: Source, tokenizer: Tokenizer) -> Iterator[str]:
    if not isinstance(source, Tokens):
        yield from Documents(source)
        return
    corpus = open_corpus(source, tokenizer)
    ends = [*corpus.starts[1:].tolist(), corpus.tokens]
    for span in zip(corpus.starts.tolist(), ends, strict=True):
        yield tokenizer.decode(corpus.read([span])[0])
