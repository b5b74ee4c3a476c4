"""Selective copying (Gu and Dao, Mamba, 2023): data among blanks, to be said in order at the end.

Where the data stand differs from example to example, so no fixed convolution does it.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol
from seqlab.tasks.draw import distinct


@dataclass(frozen=True, config=STRICT)
class Config:
    """`tokens` data ids at random places among blanks (0), then as many slots (vocab - 1).

    The label at slot i is the i-th data id, one of 1 .. vocab - 2.
    """

    vocab: Annotated[int, Field(ge=3)] = 16
    length: PositiveInt = 64
    tokens: PositiveInt = 8

    def __post_init__(self):
        if 2 * self.tokens > self.length:
            raise ConfigError(
                f"selective_copying: {self.tokens} tokens and their slots need "
                f"length >= {2 * self.tokens}, not {self.length}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        rng, n = np.random.default_rng(seed), self.tokens
        data = rng.integers(1, self.vocab - 1, (count, n), dtype=np.int32)
        inputs = np.zeros((count, self.length), np.int32)
        at = np.sort(distinct(rng, count, n, self.length - n), axis=1)
        np.put_along_axis(inputs, at, data, 1)
        inputs[:, -n:] = self.vocab - 1
        labels = np.full_like(inputs, IGNORE)
        labels[:, -n:] = data
        return Examples(inputs, labels)


_CI, _MAMBA = Config(length=256, tokens=16), Config(length=4096, tokens=16)

PROTOCOLS = {
    "ci": Protocol(
        train=((_CI, 16_384),),
        test=(("256", _CI, 512), ("512", Config(length=512, tokens=16), 256)),
        steps=2_000,
        batch=64,
        lr=(3e-3,),
    ),
    "published": Protocol(
        train=((_MAMBA, 100_000),),
        test=(("4096", _MAMBA, 1_000),),
        steps=400_000,
        batch=64,
        lr=(1e-4,),
        final_lr=1.0,
    ),
}
