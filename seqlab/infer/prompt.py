"""Prompts as checked rows of token ids, and token streams cut into pieces of one size."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from seqlab.errors import DataError


def is_stream(prompt: Any) -> bool:
    """Whether a prompt comes piece by piece (an iterator of arrays of ids) rather than at once."""
    return hasattr(prompt, "__next__")


def is_batch(prompt: Any) -> bool:
    """Whether a prompt is a batch (an array [B, T], a list of rows) rather than one row of ids."""
    if hasattr(prompt, "ndim"):
        return prompt.ndim > 1
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return isinstance(prompt[0], (list, tuple)) or np.ndim(prompt[0]) > 0


def rows_of(prompt: Any, vocab: int) -> list[np.ndarray]:
    """Ids [T] or [B, T], or a list of rows of any lengths -> the rows, [T_b] int32 each.

    Raises DataError for an empty row, for what is no token id, and for an id outside the
    vocabulary.
    """
    batch = list(prompt) if is_batch(prompt) else [prompt]
    return [checked(row, vocab, f"Row {b} of the prompt") for b, row in enumerate(batch)]


def checked(tokens: Any, vocab: int, where: str) -> np.ndarray:
    """Token ids [T] as int32; raises DataError unless there are some and all are below `vocab`."""
    try:
        ids = np.asarray(tokens)
    except ValueError:  # lists of unequal depth
        ids = np.array(None)
    if ids.size == 0:
        raise DataError(f"{where} is empty: give at least one token.")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            f"{where} is not a row of token ids but has shape {ids.shape} and dtype {ids.dtype}: "
            "encode text with the model's tokenizer."
        )
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(
            f"{where} holds the id {ids[at]} at index {at}, outside the model's vocabulary of "
            f"{vocab}: use the tokenizer that the model was trained with."
        )
    return ids.astype(np.int32)


def pieces(stream: Iterable[Any], size: int, first: int) -> Iterator[np.ndarray]:
    """A stream of arrays of ids, recut to `first` ids, then `size` a piece; the last may be
    shorter."""
    held: list[np.ndarray] = []
    length, whole = 0, first
    for part in stream:
        part = np.asarray(part)
        while length + part.size >= whole:
            cut = whole - length
            yield np.concatenate([*held, part[:cut]])
            held, length, whole, part = [], 0, size, part[cut:]
        if part.size:
            held.append(part)
            length += part.size
    if held:
        yield np.concatenate(held)
