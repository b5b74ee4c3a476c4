"""Induction heads (Gu and Dao, Mamba, 2023): what came after the special token the first time?"""

from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol


@dataclass(frozen=True, config=STRICT)
class Config:
    """Ids drawn below vocab - 1; vocab - 1 stands at a random place and once more at the end.

    The one label, at the end, is the id after its first place.
    """

    vocab: Annotated[int, Field(ge=3)] = 16
    length: Annotated[int, Field(ge=3)] = 64

    def examples(self, count: int, seed: int) -> Examples:
        rng, rows = np.random.default_rng(seed), np.arange(count)
        inputs = rng.integers(0, self.vocab - 1, (count, self.length), dtype=np.int32)
        place = rng.integers(0, self.length - 2, count)
        inputs[rows, place] = inputs[:, -1] = self.vocab - 1
        labels = np.full_like(inputs, IGNORE)
        labels[:, -1] = inputs[rows, place + 1]
        return Examples(inputs, labels)


def _lengths(train: int, test: range, **fields) -> Protocol:
    return Protocol(
        train=((Config(length=train), 100_000),),
        test=tuple((str(2**i), Config(length=2**i), 256 if i < 12 else 8) for i in test),
        weight_decay=0.0,
        **fields,
    )


PROTOCOLS = {
    "ci": _lengths(64, range(5, 11), steps=1_000, batch=64, lr=(3e-3,)),
    "published": _lengths(256, range(6, 21), steps=204_800, batch=8, lr=(1e-3, 2e-4), final_lr=1.0),
}
