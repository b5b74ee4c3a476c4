"""What a model answers on the examples of a task."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from seqlab.errors import ModelError
from seqlab.evaluate.reading import Chunk, Reader
from seqlab.tasks import Accuracy, Examples, accuracy

REMEDY = "ask shorter examples, or build the model with a larger max_length"


def score(model: Any, examples: Examples, batch: int = 32) -> Accuracy:
    """The accuracy of the likeliest ids, every example being read from an empty state.

    Raises ModelError where the examples need more ids or more room than the model has.
    """
    require_ids(model, int(max(examples.inputs.max(), examples.labels.max())) + 1, "The examples")
    count, length = examples.inputs.shape
    reader, batch = Reader(model), min(batch, count)
    reader.require_room(length, "An example", REMEDY)
    parts = [examples.inputs[i : i + batch] for i in range(0, count, batch)]
    said = np.concatenate([_likeliest(reader, part, batch) for part in parts])
    return accuracy(said, examples.labels)


def require_ids(model: Any, ids: int, what: str) -> None:
    """Raises ModelError where the model's vocabulary is smaller than what is asked of it."""
    if ids > model.config.vocab:
        raise ModelError(
            f"{what} need {ids} ids and the model's vocabulary has {model.config.vocab}: ask for "
            "fewer, or build a model with more."
        )


def _likeliest(reader: Reader, inputs: np.ndarray, rows: int) -> np.ndarray:
    count, length = inputs.shape
    size = reader.chunk_size(rows, length)
    chunks = _chunks(np.pad(inputs, ((0, rows - count), (0, 0))), size)
    said = [said.likeliest for _, said in reader.read(chunks)]
    return np.concatenate(said, 1)[:count, :length]


def _chunks(inputs: np.ndarray, size: int) -> Iterator[Chunk]:
    rows, length = inputs.shape
    width = -(-length // size) * size
    tokens = np.pad(inputs, ((0, 0), (0, width - length)))
    reset = np.broadcast_to(np.arange(width) >= length, tokens.shape)
    for at in range(0, width, size):
        part = slice(at, at + size)
        yield Chunk(tokens[:, part], np.zeros_like(tokens[:, part]), reset[:, part])
