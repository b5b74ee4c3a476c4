"""MAD's compression (Poli et al., 2024), said token by token: all that was read, in order.

MAD decodes every token from the output at the last position alone, by a network of its own. Here
the model says them one by one, with nothing new to read: the same ids are asked of what a memory
of fixed size has kept, but one that keeps all tokens may look back.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.settings import STRICT
from seqlab.tasks import mad
from seqlab.tasks.contract import IGNORE, Examples


@dataclass(frozen=True, config=STRICT)
class Config:
    """`tokens` ids below vocab - 1 at random, then as often vocab - 1; the i-th has label i.

    MAD's sequence of length L has L - 1 of them.
    """

    vocab: Annotated[int, Field(ge=2)] = 16
    tokens: PositiveInt = 15

    @property
    def length(self) -> int:
        return 2 * self.tokens

    def examples(self, count: int, seed: int) -> Examples:
        rng, n = np.random.default_rng(seed), self.tokens
        inputs = np.full((count, 2 * n), self.vocab - 1, np.int32)
        inputs[:, :n] = rng.integers(0, self.vocab - 1, (count, n))
        labels = np.full_like(inputs, IGNORE)
        labels[:, n:] = inputs[:, :n]
        return Examples(inputs, labels)


PROTOCOLS = {
    "ci": mad.small(Config(), Config()),
    **mad.protocols(
        Config(tokens=31),
        vocab=(32, 64, 128),
        tokens=(63, 127, 255),
        examples=(6400, 3200, 1600, 800),
    ),
}
