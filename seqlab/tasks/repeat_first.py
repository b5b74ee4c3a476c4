"""RepeatFirst (Morad et al., POPGym, 2023), supervised: the first card of the episode."""

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks.contract import Examples, Protocol
from seqlab.tasks.draw import episodes


@dataclass(frozen=True, config=STRICT)
class Config:
    """Cards 0 .. cards - 1 at random; one that begins an episode is written as cards + itself.

    The first begins one and `again` more begin at random places; every step is asked.
    """

    cards: PositiveInt = 4
    length: PositiveInt = 64
    again: NonNegativeInt = 2

    def __post_init__(self):
        if self.again >= self.length:
            raise ConfigError(
                f"repeat_first: again={self.again} is not below length={self.length}."
            )

    @property
    def vocab(self) -> int:
        return 2 * self.cards

    def resets(self, inputs: np.ndarray) -> np.ndarray:
        """Where an episode begins, for a model that is told: [n, L] bool."""
        return inputs >= self.cards

    def examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        cards = rng.integers(0, self.cards, (count, self.length), dtype=np.int32)
        began = episodes(rng, count, self.length, self.again)
        inputs = cards + self.cards * (began == np.arange(self.length))
        return Examples(inputs.astype(np.int32), np.take_along_axis(cards, began, 1))


PROTOCOLS = {
    "ci": Protocol(
        train=((Config(), 16_384),),
        test=tuple((str(n), Config(length=n), 256) for n in (64, 256)),
        steps=1_000,
        batch=64,
        lr=(3e-3,),
    ),
}
