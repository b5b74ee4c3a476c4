"""The element that two sets share (Arora et al., Just Read Twice, 2024).

What must be kept is the first set, so the order in which they come matters to a causal memory.
"""

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol
from seqlab.tasks.draw import distinct

MASK, PREFIX, SEPARATOR, ANSWER, ELEMENT = range(5)


@dataclass(frozen=True, config=STRICT)
class Config:
    """[1, first set, 2, second set, 3] of different ids from 4 on, but for the one in both.

    The label at the end is that one, which stands at a random place of either set.
    """

    vocab: PositiveInt = 128
    first: PositiveInt = 4
    second: PositiveInt = 16

    def __post_init__(self):
        need = ELEMENT + self.first + self.second
        if self.vocab < need:
            raise ConfigError(
                f"set_disjointness: sets of {self.first} and {self.second} ids need "
                f"vocab >= {need}, not {self.vocab}."
            )

    @property
    def length(self) -> int:
        return self.first + self.second + 3

    def examples(self, count: int, seed: int) -> Examples:
        rng, rows, n = np.random.default_rng(seed), np.arange(count), self.first
        ids = ELEMENT + distinct(rng, count, n + self.second, self.vocab - ELEMENT)
        first, second = ids[:, :n].copy(), ids[:, n:].copy()
        here, there = rng.integers(0, n, count), rng.integers(0, self.second, count)
        both = first[rows, here]
        second[rows, there] = both
        mark = lambda id: np.full((count, 1), id)
        parts = (mark(PREFIX), first, mark(SEPARATOR), second, mark(ANSWER))
        inputs = np.concatenate(parts, 1).astype(np.int32)
        labels = np.full_like(inputs, IGNORE)
        labels[:, -1] = both
        return Examples(inputs, labels)


def _both_ways(*sizes: tuple[int, int]) -> list[tuple[int, int]]:
    return [pair for a, b in sizes for pair in ((a, b), (b, a))]


def _jrt() -> Protocol:
    learnt = _both_ways((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256))
    asked = [(1, 32), *learnt, *_both_ways((4, 512), (4, 768))]
    return Protocol(
        train=tuple((Config(2048, a, b), 20_000) for a, b in learnt),
        test=tuple((f"{a}/{b}", Config(2048, a, b), 1_000) for a, b in asked),
        steps=48 * len(learnt) * -(-20_000 // 128),
        batch=128,
        lr=(1e-4, 5e-4, 8e-4),
        widths=(36, 48, 64, 96, 128),
        layers=4,
    )


PROTOCOLS = {
    "ci": Protocol(
        train=((Config(), 8_192), (Config(first=16, second=4), 8_192)),
        test=(("4/16", Config(), 256), ("16/4", Config(first=16, second=4), 256)),
        steps=1_000,
        batch=64,
        lr=(3e-3,),
        conv_first=True,
    ),
    "jrt": _jrt(),
}
