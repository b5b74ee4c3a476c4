"""A needle in a haystack of tokens: a marked key with its values, asked for at the end.

The token form of RULER's single needle (Hsieh et al., 2024), for models too small for text.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol

DEPTHS = 40  # places, evenly between the first and the last, that a depth is drawn from


@dataclass(frozen=True, config=STRICT)
class Config:
    """Ids below vocab - 1 at random, among them once [mark, key, v1 .. vn]; then [mark, key].

    The mark is vocab - 1. Labels are the `values` values from the last key on, each read along
    once said. `depth` is 0 for a needle at the start and 1 for one just before the question;
    None draws from 40 depths.
    """

    vocab: Annotated[int, Field(ge=3)] = 256
    length: PositiveInt = 64
    values: PositiveInt = 7
    depth: Annotated[float, Field(ge=0, le=1)] | None = None

    def __post_init__(self):
        need = (2 + self.values) + (1 + self.values)
        if need > self.length:
            raise ConfigError(
                f"needle: a needle of {self.values} values and its question need "
                f"length >= {need}, not {self.length}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        rng, n = np.random.default_rng(seed), self.values
        inputs = rng.integers(0, self.vocab - 1, (count, self.length), dtype=np.int32)
        needle = rng.integers(0, self.vocab - 1, (count, 2 + n), dtype=np.int32)
        needle[:, 0] = self.vocab - 1
        question = self.length - n - 1  # where it starts
        depth = rng.integers(0, DEPTHS, (count, 1)) / (DEPTHS - 1)
        if self.depth is not None:
            depth = np.full((count, 1), self.depth)
        start = np.rint(depth * (question - 2 - n)).astype(np.int64)
        np.put_along_axis(inputs, start + np.arange(2 + n), needle, 1)
        inputs[:, question:] = needle[:, :-1]
        labels = np.full_like(inputs, IGNORE)
        labels[:, -n:] = needle[:, 2:]
        return Examples(inputs, labels)


_FACTORS = (1, 2, 4, 8, 16)  # of the training length

PROTOCOLS = {
    "ci": Protocol(
        train=((Config(vocab=64, values=2), 16_384),),
        test=tuple((f"{k}x", Config(64, 64 * k, 2), 256) for k in _FACTORS),
        steps=2_000,
        batch=64,
        lr=(3e-3,),
    ),
    "ruler_like": Protocol(
        train=((Config(length=256), 100_000),),
        test=tuple(
            (f"{k}x at {depth:.0%}", Config(length=256 * k, depth=depth), 256)
            for k in _FACTORS
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        ),
        steps=20_000,
        batch=64,
        lr=(3e-3, 1e-3),
        widths=(128,),
        ffn=True,
    ),
}
