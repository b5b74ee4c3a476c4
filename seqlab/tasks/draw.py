"""Draws that many tasks share, for all examples at once."""

import numpy as np


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
