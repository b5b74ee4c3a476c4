"""The word problem of a group (Merrill et al., The Illusion of State, 2024): the product so far.

Z60 and A4xZ5 are solvable, A5 and S5 are not: no fixed depth of diagonal memories or attention
follows those for long.
"""

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks import groups
from seqlab.tasks.contract import IGNORE, Examples, Protocol


@dataclass(frozen=True, config=STRICT)
class Config:
    """Elements of `group`, drawn alike; the label is the product of all up to and with this one.

    With `moved`, only elements of an S or A that move at most so many points are drawn: 2 leaves
    swaps and the neutral element. With `spread` above 1 every element is followed by spread - 1
    blanks, and the label stands at the last of these.
    """

    group: str = "S5"
    length: PositiveInt = 32
    moved: PositiveInt | None = None
    spread: PositiveInt = 1

    def __post_init__(self):
        groups.table(self.group)
        if self.moved is not None:
            groups.moved(self.group)
        if self.length % self.spread:
            raise ConfigError(
                f"group_words: length={self.length} is not divisible by spread={self.spread}."
            )

    @property
    def vocab(self) -> int:
        return len(groups.table(self.group)) + (self.spread > 1)

    def examples(self, count: int, seed: int) -> Examples:
        rng, table = np.random.default_rng(seed), groups.table(self.group)
        drawn = np.arange(len(table))
        if self.moved is not None:
            drawn = np.flatnonzero(groups.moved(self.group) <= self.moved)
        elements = drawn[rng.integers(0, len(drawn), (count, self.length // self.spread))]
        inputs = np.full((count, self.length), len(table), np.int32)
        labels = np.full_like(inputs, IGNORE)
        inputs[:, :: self.spread] = elements
        so_far = np.zeros(count, np.int64)
        for t, element in enumerate(elements.T):
            so_far = table[so_far, element]
            labels[:, (t + 1) * self.spread - 1] = so_far
        return Examples(inputs, labels)


def _published(group: str, **fields) -> Protocol:
    """To a length four times that of training, as state tracking is shown."""
    return Protocol(
        train=((Config(group, **fields), 1_000_000),),
        test=tuple(
            (str(length), Config(group, length=length, **fields), 1_000) for length in (32, 64, 128)
        ),
        steps=500 * -(-1_000_000 // 512),
        batch=512,
        lr=(1e-4,),
        weight_decay=0.01,
        final_lr=1.0,
        widths=(128,),
        layers=1,
        ffn=True,
    )


_SWAPS = Config("S3", length=16, moved=2)

PROTOCOLS = {
    "ci": Protocol(
        train=((_SWAPS, 16_384),),
        test=tuple((str(n), Config("S3", length=n, moved=2), 256) for n in (16, 32, 64)),
        steps=1_000,
        batch=64,
        lr=(3e-3,),
        weight_decay=0.0,
        layers=1,
        ffn=True,
    ),
    **{group: _published(group) for group in ("Z60", "A4xZ5", "A5", "S5")},
    "S5_swaps": _published("S5", moved=2),
}
