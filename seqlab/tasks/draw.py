"""Draws that many tasks share, for all examples at once."""

import numpy as np

from seqlab.tasks.contract import IGNORE, Examples


def distinct(rng: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """[rows, count]: in each row different integers of [0, below), every ordered choice as likely.

    Floyd's algorithm, along the rows together: no permutation of `below` is ever made.
    """
    drawn = np.empty((rows, count), np.int64)
    for i, top in enumerate(range(below - count, below)):
        new = rng.integers(0, top + 1, rows)
        seen = (drawn[:, :i] == new[:, None]).any(1)
        drawn[:, i] = np.where(seen, top, new)
    return rng.permuted(drawn, axis=1)


def weighted(rng: np.random.Generator, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """[rows, count]: different indices of `weights`, drawn one after the other by their weights.

    The smallest of exponential waiting times are such draws (Efraimidis and Spirakis, 2006).
    """
    waits = rng.exponential(size=(rows, len(weights))) / weights
    return np.argsort(waits, axis=1)[:, :count]


def episodes(rng: np.random.Generator, rows: int, length: int, again: int) -> np.ndarray:
    """[rows, length]: where the episode of each step began; after 0, `again` begin anywhere."""
    begins = np.zeros((rows, length), np.int64)
    starts = 1 + distinct(rng, rows, again, length - 1)
    np.put_along_axis(begins, starts, starts, 1)
    return np.maximum.accumulate(begins, axis=1)


def next_of(text: np.ndarray, asked: np.ndarray) -> Examples:
    """The label at t is the id at t + 1 where that is asked; after the last there is none."""
    labels = np.full(text.shape, IGNORE, np.int32)
    labels[:, :-1] = np.where(asked[:, 1:], text[:, 1:], IGNORE)
    return Examples(text.astype(np.int32), labels)
