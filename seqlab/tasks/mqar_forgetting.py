"""Associative recall in which some keys get a new value: only the last one counts (Zoology).

It tells memories that overwrite (delta rule, gates) from those that only add.
"""

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT, PositiveFinite
from seqlab.tasks.contract import IGNORE, Examples
from seqlab.tasks.draw import distinct
from seqlab.tasks.mqar import ask, fill, small, sweep


@dataclass(frozen=True, config=STRICT)
class Config:
    """As in `mqar`; after the pairs, `updates` of the keys come again with another value."""

    vocab: PositiveInt = 128
    length: PositiveInt = 64
    pairs: PositiveInt = 8
    updates: PositiveInt = 4
    power: PositiveFinite = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        need = 2 * (2 * self.pairs + self.updates)
        if need > self.length:
            raise ConfigError(
                f"mqar_forgetting: {self.pairs} pairs, {self.updates} updates and the queries "
                f"need length >= {need}, not {self.length}."
            )
        if self.updates > self.pairs:
            raise ConfigError(
                f"mqar_forgetting: updates={self.updates} is more than there are pairs, "
                f"{self.pairs}."
            )
        if self.pairs > self.vocab // 2 - 1:
            raise ConfigError(
                f"mqar_forgetting: {self.pairs} pairs need vocab >= {2 * self.pairs + 2}, "
                f"not {self.vocab}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        rng, n, half = np.random.default_rng(seed), self.pairs, self.vocab // 2
        upper = self.vocab - half
        keys = 1 + distinct(rng, count, n, half - 1)
        values = distinct(rng, count, n, upper)  # counted from `half` on
        changed = distinct(rng, count, self.updates, n)
        old = np.take_along_axis(values, changed, 1)
        new = (old + rng.integers(1, upper, old.shape)) % upper
        first = np.stack([keys, half + values], 2).reshape(count, -1)
        again = np.stack([np.take_along_axis(keys, changed, 1), half + new], 2).reshape(count, -1)
        np.put_along_axis(values, changed, new, 1)

        inputs = np.zeros((count, self.length), np.int32)
        start = first.shape[1] + again.shape[1]
        inputs[:, :start] = np.concatenate([first, again], 1)
        labels = np.full_like(inputs, IGNORE)
        ask(rng, inputs, labels, keys[..., None], half + values, start, self.power)
        if self.random_non_queries:
            fill(rng, inputs, self.vocab)
        return Examples(inputs, labels)


PROTOCOLS = {"ci": small(Config), "sweep": sweep(Config)}
