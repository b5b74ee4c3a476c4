"""Strings of letters as ids, and examples made of several of them ("Repeat After Me", 2024)."""

from collections.abc import Callable

import numpy as np

from seqlab.tasks.contract import IGNORE, Examples

#: What follows the letters 0 .. letters - 1 among the ids: start, bar, stop and padding.
MARKS = 4


def marks(letters: int) -> tuple[int, int, int, int]:
    """The ids of start ($), bar (|), stop (.) and padding (*)."""
    return letters, letters + 1, letters + 2, letters + 3


def packed(
    draw: Callable[[], tuple[list[int], int]], count: int, length: int, pad: int, several: bool
) -> Examples:
    """Rows of what `draw` gives, ids and how many of them are question: the rest are labels.

    With `several`, one string follows the other until the row is full, and one that is cut off
    asks nothing; else a row is one string and padding.
    """
    inputs = np.full((count, length), pad, np.int32)
    labels = np.full((count, length), IGNORE, np.int32)
    for row in range(count):
        end = 0
        while end < length:
            ids, question = draw()
            start, end = end, end + len(ids)
            inputs[row, start:end] = ids[: length - start]
            if end <= length:
                labels[row, start + question - 1 : end - 1] = ids[question:]
            if not several:
                break
    return Examples(inputs, labels)
