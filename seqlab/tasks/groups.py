"""Finite groups as multiplication tables: Z60, S5, A5, and products such as A4xZ5."""

import functools
import itertools
import math
import re

import numpy as np

from seqlab.errors import ConfigError

LARGEST = 1024  # elements


@functools.cache
def table(name: str) -> np.ndarray:
    """[order, order] int32: entry (a, b) is the element a * b, first a and then b; 0 is neutral.

    S and A number their permutations as `permutations` lists them; a product AxB numbers (a, b)
    as a * order(B) + b. Raises ConfigError for a name that is not a group of at most `LARGEST`.
    """
    product = np.zeros((1, 1), np.int32)
    for factor in name.split("x"):
        product = _direct(product, _factor(factor, name))
    return product


def permutations(n: int, even: bool) -> np.ndarray:
    """[order, n]: the permutations of n points in lexicographic order, or the even ones alone."""
    every = np.array(list(itertools.permutations(range(n))))
    inversions = (every[:, :, None] > every[:, None, :]) & ~np.tri(n, dtype=bool)
    return every[inversions.sum((1, 2)) % 2 == 0] if even else every


def moved(name: str) -> np.ndarray:
    """[order]: how many points each element of an S or A moves."""
    kind, n = _parsed(name, name)
    if kind == "Z":
        raise ConfigError(f"group_words: no element of {name} moves points: take an S or an A.")
    return (permutations(n, kind == "A") != np.arange(n)).sum(1)


def _factor(factor: str, name: str) -> np.ndarray:
    kind, n = _parsed(factor, name)
    if kind == "Z":
        return (np.arange(n)[:, None] + np.arange(n)) % n
    every = permutations(n, kind == "A")
    digits = n ** np.arange(n)  # a permutation as one number
    both = every[:, every].swapaxes(0, 1)  # [a, b, point]: what b makes of what a makes of it
    numbers = every @ digits
    order = np.argsort(numbers)
    return order[np.searchsorted(numbers, both @ digits, sorter=order)]


def _parsed(factor: str, name: str) -> tuple[str, int]:
    match = re.fullmatch(r"([SAZ])([1-9]\d{0,3})", factor)
    if not match:
        raise ConfigError(f"There is no group {name!r}: write Z60, A5, S5, or products as A4xZ5.")
    kind, n = match[1], int(match[2])
    order = n if kind == "Z" else math.factorial(min(n, 10)) // (2 if kind == "A" and n > 1 else 1)
    if order > LARGEST:
        raise ConfigError(f"The group {factor} has more than {LARGEST} elements: take a smaller n.")
    return kind, n


def _direct(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The table of pairs of elements of two groups."""
    order = len(a) * len(b)
    if order > LARGEST:
        raise ConfigError(f"A product of {order} elements has more than {LARGEST}: take fewer.")
    pairs = a[:, None, :, None] * len(b) + b[None, :, None, :]
    return pairs.reshape(order, order).astype(np.int32)
