"""Copying strings (Jelassi et al., Repeat After Me, 2024): `$string|string.`"""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks import strings
from seqlab.tasks.contract import Examples, Protocol


@dataclass(frozen=True, config=STRICT)
class Config:
    """Strings of `shortest` to `longest` letters; from the bar on, each next id is the label.

    With `several`, a row is strings one after the other; else one of them and padding.
    """

    letters: Annotated[int, Field(ge=1)] = 26
    length: PositiveInt = 64
    shortest: PositiveInt = 5
    longest: PositiveInt = 20
    several: bool = True

    def __post_init__(self):
        if self.shortest > self.longest:
            raise ConfigError(f"copy: shortest={self.shortest} is above longest={self.longest}.")
        if 2 * self.longest + 3 > self.length:
            raise ConfigError(
                f"copy: strings of {self.longest} letters need length >= "
                f"{2 * self.longest + 3}, not {self.length}."
            )

    @property
    def vocab(self) -> int:
        return self.letters + strings.MARKS

    def examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        start, bar, stop, pad = strings.marks(self.letters)

        def draw() -> tuple[list[int], int]:
            size = rng.integers(self.shortest, self.longest + 1)
            string = rng.integers(0, self.letters, size).tolist()
            return [start, *string, bar, *string, stop], len(string) + 2

        return strings.packed(draw, count, self.length, pad, self.several)


def _longer(size: int, length: int) -> Config:
    return Config(length=length, shortest=size, longest=size, several=False)


PROTOCOLS = {
    "ci": Protocol(
        train=((Config(), 16_384),),
        test=tuple((str(n), _longer(n, 2 * n + 3), 256) for n in (5, 10, 20, 40)),
        steps=1_000,
        batch=64,
        lr=(3e-3,),
    ),
    "repeat_after_me": Protocol(
        train=((Config(length=220), 64_000),),
        test=tuple((str(n), _longer(n, 220), 1_000) for n in (5, 10, 20, 30, 50, 75, 100)),
        steps=8_000,
        batch=8,
        lr=(1e-5,),
        weight_decay=0.0,
        final_lr=1.0,
        widths=(1024,),
        layers=12,
        ffn=True,
    ),
}
