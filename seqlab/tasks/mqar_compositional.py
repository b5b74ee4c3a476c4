"""Associative recall by keys of two tokens, neither of which tells the value alone (Zoology)."""

import math

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
    """Every pair of sqrt(pairs) first and as many second tokens has a value: a grid, shuffled.

    First tokens, second tokens and values are different ids of the three thirds of the vocabulary.
    After the triples, each pair comes once more; the label at its second token is the value.
    """

    vocab: PositiveInt = 192
    length: PositiveInt = 64
    pairs: PositiveInt = 9
    power: PositiveFinite = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        side, third = math.isqrt(self.pairs), self.vocab // 3
        if side**2 != self.pairs:
            raise ConfigError(
                f"mqar_compositional: pairs={self.pairs} is not a square, such as {side**2}."
            )
        if 6 * self.pairs > self.length:
            raise ConfigError(
                f"mqar_compositional: {self.pairs} pairs and their queries need "
                f"length >= {6 * self.pairs}, not {self.length}."
            )
        if side > third - 1 or self.pairs > self.vocab - 2 * third:
            raise ConfigError(
                f"mqar_compositional: {self.pairs} pairs need "
                f"vocab >= {3 * max(side + 1, self.pairs)}, not {self.vocab}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        rng, n, third = np.random.default_rng(seed), self.pairs, self.vocab // 3
        side = math.isqrt(n)
        firsts = 1 + distinct(rng, count, side, third - 1)
        seconds = third + distinct(rng, count, side, third)
        values = 2 * third + distinct(rng, count, n, self.vocab - 2 * third)
        cells = distinct(rng, count, n, n)  # in what order the grid is read
        keys = np.stack(
            [
                np.take_along_axis(firsts, cells // side, 1),
                np.take_along_axis(seconds, cells % side, 1),
            ],
            axis=2,
        )  # [count, n, 2]
        inputs = np.zeros((count, self.length), np.int32)
        inputs[:, : 3 * n] = np.concatenate([keys, values[..., None]], 2).reshape(count, -1)
        labels = np.full_like(inputs, IGNORE)
        ask(rng, inputs, labels, keys, values, 3 * n, self.power)
        if self.random_non_queries:
            fill(rng, inputs, self.vocab)
        return Examples(inputs, labels)


PROTOCOLS = {"ci": small(Config, pairs=9), "sweep": sweep(Config)}
