"""RepeatPrevious (Morad et al., POPGym, 2023), supervised: the card seen `back` steps ago."""

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol
from seqlab.tasks.draw import episodes


@dataclass(frozen=True, config=STRICT)
class Config:
    """Cards 0 .. cards - 1 at random; one that begins an episode is written as cards + itself.

    The first begins one and `again` more begin at random places; nothing is asked of the first
    `back` steps of an episode.
    """

    cards: PositiveInt = 4
    length: PositiveInt = 64
    back: PositiveInt = 4
    again: NonNegativeInt = 2

    def __post_init__(self):
        if (self.again + 1) * self.back >= self.length:
            raise ConfigError(
                f"repeat_previous: {self.again + 1} episodes that look {self.back} back need "
                f"length > {(self.again + 1) * self.back}, not {self.length}."
            )

    @property
    def vocab(self) -> int:
        return 2 * self.cards

    def resets(self, inputs: np.ndarray) -> np.ndarray:
        """Where an episode begins, for a model that is told: [n, L] bool."""
        return inputs >= self.cards

    def examples(self, count: int, seed: int) -> Examples:
        rng, place = np.random.default_rng(seed), np.arange(self.length)
        cards = rng.integers(0, self.cards, (count, self.length), dtype=np.int32)
        began = episodes(rng, count, self.length, self.again)
        inputs = cards + self.cards * (began == place)
        earlier = np.roll(cards, self.back, axis=1)
        labels = np.where(place - self.back >= began, earlier, IGNORE)
        return Examples(inputs.astype(np.int32), labels.astype(np.int32))


PROTOCOLS = {
    "ci": Protocol(
        train=((Config(), 16_384),),
        test=tuple((str(n), Config(length=n), 256) for n in (64, 256)),
        steps=1_000,
        batch=64,
        lr=(3e-3,),
    ),
}
