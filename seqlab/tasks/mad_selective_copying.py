"""MAD's selective copying (Poli et al., 2024): data among blanks, said in order when told to."""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks import mad
from seqlab.tasks.contract import IGNORE, Examples
from seqlab.tasks.draw import distinct


@dataclass(frozen=True, config=STRICT)
class Config:
    """`tokens` ids below vocab - 2 at random places among blanks (vocab - 2), then vocab - 1,
    then as many blanks, whose labels are the ids in order."""

    vocab: Annotated[int, Field(ge=3)] = 16
    length: PositiveInt = 64
    tokens: PositiveInt = 8

    def __post_init__(self):
        if 2 * self.tokens + 1 > self.length:
            raise ConfigError(
                f"mad_selective_copying: {self.tokens} tokens, said again when told to, need "
                f"length >= {2 * self.tokens + 1}, not {self.length}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        rng, n = np.random.default_rng(seed), self.tokens
        data = rng.integers(0, self.vocab - 2, (count, n), dtype=np.int32)
        inputs = np.full((count, self.length), self.vocab - 2, np.int32)
        at = np.sort(distinct(rng, count, n, self.length - n - 1), axis=1)
        np.put_along_axis(inputs, at, data, 1)
        inputs[:, -n - 1] = self.vocab - 1
        labels = np.full_like(inputs, IGNORE)
        labels[:, -n:] = data
        return Examples(inputs, labels)


PROTOCOLS = {
    "ci": mad.small(Config(), Config()),
    **mad.protocols(
        Config(length=256, tokens=16),
        vocab=(32, 64, 128),
        length=(512, 1024),
        tokens=(32, 64, 96),
        examples=(6400, 3200, 1600, 800),
    ),
}
