"""Looking up an n-gram (Jelassi et al., Repeat After Me, 2024): what follows it in the string?"""

from typing import Literal

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks import strings
from seqlab.tasks.contract import Examples, Protocol


@dataclass(frozen=True, config=STRICT)
class Config:
    """`$gram|string|continuation.` asked "before", `$string|gram continuation.` asked "after".

    The gram of `gram` letters stands once in the string; its continuation reaches to the end of
    the string, or over `answer` letters.
    """

    letters: PositiveInt = 26
    length: PositiveInt = 64
    shortest: PositiveInt = 8
    longest: PositiveInt = 20
    gram: PositiveInt = 3
    answer: PositiveInt | None = None
    asked: Literal["before", "after"] = "after"
    several: bool = True

    def __post_init__(self):
        least = self.gram + (self.answer or 1)
        if not least <= self.shortest <= self.longest:
            raise ConfigError(
                f"ngram_lookup: shortest={self.shortest} is not between {least}, a gram and its "
                f"answer, and longest={self.longest}."
            )
        if 2 * self.longest + 4 > self.length:
            raise ConfigError(
                f"ngram_lookup: strings of {self.longest} letters need length >= "
                f"{2 * self.longest + 4}, not {self.length}."
            )
        if self.letters**self.gram < self.longest:
            raise ConfigError(
                f"ngram_lookup: {self.letters} letters make too few grams of {self.gram} for one "
                f"to be the only one in {self.longest} letters: raise either."
            )

    @property
    def vocab(self) -> int:
        return self.letters + strings.MARKS

    def examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        start, bar, stop, pad = strings.marks(self.letters)

        def draw() -> tuple[list[int], int]:
            string, at = self._string(rng)
            end = at + self.gram
            gram, rest = string[at:end], string[end:][: self.answer]
            if self.asked == "before":
                question = [start, *gram, bar, *string, bar]
            else:
                question = [start, *string, bar, *gram]
            return [*question, *rest, stop], len(question)

        return strings.packed(draw, count, self.length, pad, self.several)

    def _string(self, rng: np.random.Generator) -> tuple[list[int], int]:
        """A string and where in it a gram begins that stands there alone."""
        while True:
            size = rng.integers(self.shortest, self.longest + 1)
            string = rng.integers(0, self.letters, size).tolist()
            grams = [tuple(string[i : i + self.gram]) for i in range(size - self.gram + 1)]
            at = int(rng.integers(0, size - self.gram - (self.answer or 1) + 1))
            if grams.count(grams[at]) == 1:
                return string, at


PROTOCOLS = {
    "ci": Protocol(
        train=((Config(), 16_384),),
        test=tuple(
            (f"{n}", Config(length=2 * n + 4, shortest=n, longest=n, several=False), 256)
            for n in (10, 20, 40)
        ),
        steps=1_000,
        batch=64,
        lr=(3e-3,),
    ),
}
