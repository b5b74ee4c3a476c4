"""Rows for training: sources mixed by weight, shuffled by epoch, prefetched, resumed from integers.

Which row comes next follows from one integer per source, the rows taken so far, whatever the number
of hosts. grain provides the shuffle (a keyed permutation with random access, so an epoch needs no
memory); its iterators are not used, because their saved state is a blob per host and per worker.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import DataError, nearest
from seqlab.models.tokenizer import Tokenizer
from seqlab.settings import STRICT
from seqlab.train.corpus import Batch, Corpus, Row, gather, open_corpus
from seqlab.train.grouping import grouped
from seqlab.train.sources import Source

Position = dict[str, int]


@dataclass(frozen=True, config=STRICT)
class Data:
    """What to train on.

    train, held_out: sources; their names must differ among those of `train`.
    tokenizer: "bytes" or the path of a tokenizer.json. length: tokens a row predicts.
    batch: rows over all hosts. held_out_rows: how many rows, spread evenly over the held-out
    text, an evaluation reads; None for all of it.
    balance: None cuts the text into rows wherever they end. A number groups whole documents into
    rows of like work, so ordered that softmax attention keeps as many devices along mesh.seq alike
    busy.
    """

    train: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()
    tokenizer: str = "bytes"
    length: PositiveInt = 128
    batch: PositiveInt = 8
    seed: NonNegativeInt = 0
    held_out_rows: PositiveInt | None = 64
    balance: PositiveInt | None = None

    def __post_init__(self):
        if not self.train:
            raise DataError("data.train names no source: give at least one.")
        for sources in (self.train, self.held_out):
            counts = collections.Counter(source.name for source in sources)
            twice = [name for name, count in counts.items() if count > 1]
            if twice:
                raise DataError(f"Two sources are named {twice[0]!r}: give each its own name.")


class Loader:
    """Iterates for ever over this process's rows of every batch, read ahead in the background.

    start: the `position` of an earlier loader; fingerprint: its `fingerprint`, to be equal.
    rows: which rows of each batch are this process's; all of them by default.

    position: after the batch that came last, {source name: rows taken by all processes}.
    fingerprint: what a position relies on: tokenizer, length, seed, each source's text and weight.
    bytes_per_token: bytes of text per predicted token, averaged over the mixture.
    notes: sentences for the user, such as files skipped.

    A batch that cannot be read raises where it is due, with the traceback of the reading thread;
    `position` then still names the batch before. Close the loader, or use it in a `with`.
    Raises DataError where the data is too small, has changed, or cannot be read.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: Tokenizer,
        *,
        start: Mapping[str, int] | None = None,
        fingerprint: Mapping[str, str] | None = None,
        rows: Sequence[int] | None = None,
        prefetch: int = 2,
    ):
        self.data, self._tokenizer = data, tokenizer
        self._mine = range(data.batch) if rows is None else rows
        sources = sorted(data.train, key=lambda source: source.name)  # their order is no matter
        corpora = [open_corpus(source, tokenizer) for source in sources]
        self._corpora = [_grouped(corpus, data) for corpus in corpora]
        self.tokens = sum(c.tokens for c in self._corpora)
        _check_size(self.tokens, data)
        self.fingerprint = _fingerprint(data, tokenizer, self._corpora)
        if fingerprint is not None:
            _check_unchanged(self.fingerprint, fingerprint)
        self.notes = tuple(note for c in self._corpora for note in c.notes)
        self.position = _position([c.source.name for c in self._corpora], start)
        self._ahead = dict(self.position)  # the position after the last batch asked for
        self._shares = _shares(self._corpora)
        self._prefetch = prefetch
        self._pool = concurrent.futures.ThreadPoolExecutor(2, "seqlab-data")
        self._queue: collections.deque = collections.deque()

    @property
    def bytes_per_token(self) -> float:
        return float(self._shares @ [c.bytes / c.targets for c in self._corpora])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._queue) <= self._prefetch:
            drawn = self._draw()
            rows = [drawn[i] for i in self._mine]
            future = self._pool.submit(gather, self._corpora, rows, self.data.length)
            self._queue.append((future, dict(self._ahead)))
        future, position = self._queue[0]
        batch = future.result()  # an interrupt while waiting loses nothing
        self._queue.popleft()
        self.position = position
        return batch

    def close(self) -> None:
        """Stop reading ahead; no thread is left when this returns."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _draw(self) -> list[Row]:
        """The rows of the next global batch: each from the source that lags its share most."""
        names = list(self._ahead)
        taken = np.array(list(self._ahead.values()), np.float64)
        rows = []
        for _ in range(self.data.batch):
            source = int(np.argmax(self._shares * (taken.sum() + 1) - taken))
            count = self._ahead[names[source]]
            size = self._corpora[source].rows(self.data.length)
            rows.append((source, shuffled(count, size, self.data.seed)))
            taken[source] += 1
            self._ahead[names[source]] = count + 1
        return rows


@functools.lru_cache(maxsize=1024)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def shuffled(n: int, rows: int, seed: int) -> int:
    """The n-th row that a source of `rows` rows gives; each epoch is another permutation."""
    epoch, i = divmod(n, rows)
    shuffle = grain.experimental.index_shuffle
    return shuffle(i, max_index=rows - 1, seed=_epoch_seed(seed, epoch), rounds=4)


def _grouped(corpus: Corpus, data: Data) -> Corpus:
    if data.balance is None:
        return corpus
    return grouped(corpus, data.length, data.balance, data.seed)


def _shares(corpora: list[Corpus]) -> np.ndarray:
    weights = np.array([c.source.weight for c in corpora])
    return weights / weights.sum()


def _check_size(tokens: int, data: Data) -> None:
    needed = data.batch * data.length
    if tokens < needed:
        raise DataError(
            f"The training data holds {tokens} tokens, less than one batch of {data.batch} x "
            f"{data.length} = {needed}: give more text, or lower data.batch or data.length."
        )


def _fingerprint(data: Data, tokenizer: Tokenizer, corpora: list[Corpus]) -> dict[str, str]:
    content = {f"source {c.source.name!r}": f"{c.digest} x {c.source.weight}" for c in corpora}
    rows = {"data.length": str(data.length), "data.seed": str(data.seed)}
    if data.balance is not None:
        rows |= {"data.balance": str(data.balance)}
    return {"the tokenizer": tokenizer.fingerprint} | rows | content


def _check_unchanged(now: Mapping[str, str], then: Mapping[str, str]) -> None:
    changed = [name for name in {**then, **now} if now.get(name) != then.get(name)]
    if changed:
        raise DataError(
            f"The data is not what the checkpoint was trained on ({', '.join(changed)} changed): "
            "restore it to go on, or start a new run."
        )


def _position(names: list[str], start: Mapping[str, int] | None) -> Position:
    if start is None:
        return dict.fromkeys(names, 0)
    for name in {**start, **dict.fromkeys(names)}:
        if name not in start:
            raise DataError(f"The checkpoint has no position for source {name!r}: start a new run.")
        if name not in names:
            raise DataError(
                f"The checkpoint has a position for source {name!r}, which data.train lacks: "
                + nearest(name, names)
            )
        if type(start[name]) is not int or start[name] < 0:
            raise DataError(
                f"The checkpoint's position of source {name!r} is {start[name]!r} and not a count "
                "of rows: use another checkpoint."
            )
    return {name: start[name] for name in names}
