"""How well a model predicts texts: every document from its first token to its last, once."""

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from seqlab.errors import DataError
from seqlab.evaluate.reading import Chunk, Reader
from seqlab.train.corpus import Corpus


class Perplexity(NamedTuple):
    """Sums over all predicted tokens: all but the first of each document."""

    documents: int
    tokens: int
    bytes: int
    nats: float
    right: int  # tokens that were the likeliest

    @property
    def loss(self) -> float:
        """Nats per token, as training reports it."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond, a float64 is infinite

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def accuracy(self) -> float:
        return self.right / self.tokens


def perplexity(
    model: Any,
    corpus: Corpus,
    *,
    batch: int = 8,
    window: int | None = None,
    on_progress: Callable[[float], object] = lambda share: None,
) -> Perplexity:
    """The whole corpus, each document from an empty state on, whatever its length.

    Memory does not grow with it: `batch` documents are read side by side, a chunk at a time, and
    the state carries what came before; a document is cut nowhere. With `window` all is cut every
    `window` tokens and each piece starts anew, as training and its held-out loss do it.

    Raises DataError for ids beyond the model's vocabulary, and ModelError for documents longer
    than its max_length, for logits that are not numbers, and for a model with a prefix.
    """
    segments = _segments(corpus, window)
    reader, longest = Reader(model), int(np.diff(segments).max())
    remedy = f"give a window of {model.max_length} or fewer"
    reader.require_no_prefix()
    reader.require_room(longest, "A document", remedy)
    lanes = _lanes(segments, batch)
    size = reader.chunk_size(len(lanes), max(int(lane.ends[-1]) for lane in lanes))
    total, done, nats, right = int(np.diff(segments).sum()), 0, 0.0, 0
    chunks = _chunks(corpus, lanes, size, model.config.vocab)
    for chunk, said in reader.read(chunks):
        counted = chunk.targets >= 0
        done += int(counted.sum())
        nats += float(said.nats[counted].sum(dtype=np.float64))
        right += int((said.likeliest == chunk.targets)[counted].sum())
        on_progress(done / total)
    return Perplexity(len(corpus.starts), total, corpus.bytes, nats, right)


class _Lane(NamedTuple):
    """The segments that one row of the batch reads, one after the other."""

    starts: np.ndarray  # in the corpus
    ends: np.ndarray  # in the lane

    def pieces(self, at: int, size: int) -> Iterator[tuple[int, int, int, bool]]:
        """Of the lane's tokens from `at` on, those of each segment: the place in the chunk, start
        and stop in the corpus, and whether the segment begins there."""
        stop = min(at + size, int(self.ends[-1]))
        i = int(np.searchsorted(self.ends, at, side="right"))
        here = at
        while here < stop:
            end = int(self.ends[i])
            begin = int(self.ends[i - 1]) if i else 0
            upto = min(end, stop)
            start = int(self.starts[i]) + here - begin
            yield here - at, start, start + upto - here, here == begin
            here, i = upto, i + 1


def _segments(corpus: Corpus, window: int | None) -> np.ndarray:
    """[n, 2]: the tokens [start, stop) that are read, each of which predicts the one after it."""
    ends = np.append(corpus.starts[1:], corpus.tokens)
    cuts = np.concatenate([corpus.starts, ends - 1])
    if window is not None:
        cuts = np.concatenate([cuts, np.arange(0, corpus.tokens, window)])
    cuts = np.unique(cuts)
    segments = np.stack([cuts[:-1], cuts[1:]], 1)
    return segments[~np.isin(segments[:, 0], ends - 1)]


def _lanes(segments: np.ndarray, batch: int) -> list[_Lane]:
    """The segments shared out, the longest first, each to the lane that has least to read."""
    lengths = np.diff(segments)[:, 0]
    count = min(batch, len(segments))
    heap, shares = [(0, lane) for lane in range(count)], [[] for _ in range(count)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        load, lane = heapq.heappop(heap)
        shares[lane].append(i)
        heapq.heappush(heap, (load + int(lengths[i]), lane))
    return [_Lane(segments[share, 0], np.cumsum(lengths[share])) for share in shares]


def _chunks(corpus: Corpus, lanes: list[_Lane], size: int, vocab: int) -> Iterator[Chunk]:
    """Padding has the target -1 and a document of its own at every token."""
    for at in range(0, max(int(lane.ends[-1]) for lane in lanes), size):
        shape = len(lanes), size
        tokens, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        reset = np.ones(shape, bool)
        pieces = [
            (row, *piece) for row, lane in enumerate(lanes) for piece in lane.pieces(at, size)
        ]
        read = corpus.read([(start, stop + 1) for _, _, start, stop, _ in pieces])
        for (row, place, _, _, begins), ids in zip(pieces, read, strict=True):
            part = slice(place, place + len(ids) - 1)
            tokens[row, part], targets[row, part] = ids[:-1], ids[1:]
            reset[row, part] = False
            reset[row, place] = begins
        largest = int(max(tokens.max(), targets.max()))
        if largest >= vocab:
            raise DataError(
                f"{corpus.source.name} holds the id {largest} and the model's vocabulary has "
                f"{vocab}: give what its own tokenizer made."
            )
        yield Chunk(tokens, targets, reset)
