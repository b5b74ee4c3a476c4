"""What a model answers on the examples of a task."""

from typing import Any

import numpy as np

from seqlab.errors import ModelError
from seqlab.evaluate.reading import Reader, chunks
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
            f"{what}: {ids} ids are needed and the model's vocabulary has {model.config.vocab}: "
            "ask for fewer, or build a model with more."
        )


def _likeliest(reader: Reader, inputs: np.ndarray, rows: int) -> np.ndarray:
    count, length = inputs.shape
    tokens = np.pad(inputs, ((0, rows - count), (0, 0)))
    read = chunks(tokens, np.full_like(tokens, -1), reader.chunk_size(rows, length))
    said = [said.likeliest for _, said in reader.read(read)]
    return np.concatenate(said, 1)[:count, :length]
