"""MAD's fuzzy in-context recall (Poli et al., 2024): keys and values of several ids each."""

from typing import Literal

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks import mad
from seqlab.tasks.contract import Examples
from seqlab.tasks.draw import distinct, next_of


@dataclass(frozen=True, config=STRICT)
class Config:
    """Keys and values of 1 to `motif` different ids; a pair that came is asked again at the end.

    Padding (vocab - 1) comes first, as the pairs do not fill the row. Keys are the lower half of
    the other ids, values the upper one. Labels are the next id: everywhere with targets="all",
    as MAD trains; or, as it tests, those of the values of keys that came before, and then all
    keys have `motif` ids.
    """

    vocab: PositiveInt = 16
    length: PositiveInt = 64
    motif: PositiveInt = 3
    targets: Literal["seen", "all"] = "seen"

    def __post_init__(self):
        if self.vocab < 2 * self.motif + 1:
            raise ConfigError(
                f"mad_fuzzy_recall: keys and values of {self.motif} ids need "
                f"vocab >= {2 * self.motif + 1}, not {self.vocab}."
            )
        if self.length < 4 * self.motif:
            raise ConfigError(
                f"mad_fuzzy_recall: a pair and its question need length >= {4 * self.motif}, "
                f"not {self.length}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        rng, L = np.random.default_rng(seed), self.length
        text = np.full((count, L), self.vocab - 1)
        asked = np.zeros((count, L), bool)
        for row, pairs in enumerate(self._pairs(rng, count)):
            ids, values = _read(rng, pairs, L)
            text[row, L - len(ids) :] = ids
            asked[row, L - len(ids) :] = values
        return next_of(text, asked | (self.targets == "all"))

    def _pairs(self, rng: np.random.Generator, count: int):
        """For each row, more pairs of a key and a value, tuples of ids, than it has room for."""
        half, n, most = (self.vocab - 1) // 2, self.length // 2, self.motif
        keys = distinct(rng, count * n, most, half).reshape(count, n, most)
        values = half + distinct(rng, count * n, most, self.vocab - 1 - half).reshape(keys.shape)
        sizes = rng.integers(1, most + 1, (count, n, 2))
        if self.targets == "seen":
            sizes[..., 0] = most
        for row in zip(keys.tolist(), values.tolist(), sizes.tolist(), strict=True):
            yield [(tuple(k[:a]), tuple(v[:b])) for k, v, (a, b) in zip(*row, strict=True)]


def _read(rng: np.random.Generator, pairs: list, room: int) -> tuple[list[int], list[bool]]:
    """The ids of a row, and which are of the value of a key that came before.

    The first pair is the one asked again at the end; among the others it stands anywhere.
    """
    probe, *others = pairs
    value_of, size = dict([probe]), 2 * _size(probe)
    read = []
    for key, value in others:
        pair = key, value_of.setdefault(key, value)
        if size + _size(pair) > room:
            break
        read.append(pair)
        size += _size(pair)
    read.insert(int(rng.integers(len(read) + 1)), probe)
    ids, asked, came = [], [], set()
    for key, value in [*read, probe]:
        ids += [*key, *value]
        asked += [False] * len(key) + [key in came] * len(value)
        came.add(key)
    return ids, asked


def _size(pair: tuple[tuple, tuple]) -> int:
    return len(pair[0]) + len(pair[1])


PROTOCOLS = {
    "ci": mad.small(Config(targets="all"), Config()),
    **mad.protocols(
        Config(length=128, targets="all"),
        {"targets": "seen"},
        vocab=(32, 64, 128),
        length=(256, 512, 1024),
        examples=(6400, 3200, 1600, 800),
    ),
}
