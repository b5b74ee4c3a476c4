"""MAD's memorisation (Poli et al., 2024): a dictionary that stands nowhere but in the weights."""

from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt
from pydantic.dataclasses import dataclass

from seqlab.settings import STRICT
from seqlab.tasks import mad
from seqlab.tasks.contract import IGNORE, Examples


@dataclass(frozen=True, config=STRICT)
class Config:
    """Keys at random, each followed by vocab - 1, at which its value is the label.

    Keys are the lower half of the other ids, values the upper one; which belong together is drawn
    from `map_seed` alone, so that what is tested is what was learnt.
    """

    vocab: Annotated[int, Field(ge=3)] = 64
    length: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    map_seed: NonNegativeInt = 12345

    def examples(self, count: int, seed: int) -> Examples:
        half = (self.vocab - 1) // 2
        upper = np.arange(half, self.vocab - 1)
        value_of = np.random.default_rng(self.map_seed).permutation(upper)
        keys = np.random.default_rng(seed).integers(0, half, (count, self.length // 2))
        inputs = np.full((count, self.length), self.vocab - 1, np.int32)
        labels = np.full_like(inputs, IGNORE)
        inputs[:, ::2] = keys
        labels[:, 1::2] = value_of[keys]
        return Examples(inputs, labels)


PROTOCOLS = {
    "ci": mad.small(Config(), Config()),
    **mad.protocols(Config(vocab=256), count=256, vocab=(512, 1024, 2048, 4096, 8192)),
}
