"""MAD's in-context recall (Poli et al., 2024): which value did this key have before?"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from seqlab.settings import STRICT
from seqlab.tasks import mad
from seqlab.tasks.contract import Examples
from seqlab.tasks.draw import next_of


@dataclass(frozen=True, config=STRICT)
class Config:
    """k v k v ... at random, a key keeping its value; the last pair's key came before.

    Keys are the lower half of the ids, values the upper one. The label is the next id: everywhere
    with targets="all", as MAD trains; or only where that is the value of a key that came before,
    as it tests.
    """

    vocab: Annotated[int, Field(ge=2)] = 16
    length: Annotated[int, Field(ge=4, multiple_of=2)] = 64
    targets: Literal["seen", "all"] = "seen"

    def examples(self, count: int, seed: int) -> Examples:
        return recall(seed, count, self.length, self.vocab, all_asked=self.targets == "all")


def recall(
    seed: int,
    count: int,
    length: int,
    vocab: int,
    noise: int = 0,
    fraction: float = 0.0,
    *,
    all_asked: bool,
) -> Examples:
    """Pairs of a key and its value; each but one is two of the `noise` ids from `vocab` on with
    probability `fraction`."""
    rng, rows = np.random.default_rng(seed), np.arange(count)
    pairs, half = length // 2, vocab // 2
    values = half + rng.integers(0, vocab - half, (count, half))  # of every key
    keys = rng.integers(0, half, (count, pairs))
    noisy = rng.random((count, pairs)) < fraction
    noisy[rows, rng.integers(0, pairs - 1, count)] = noisy[:, -1] = False

    came = np.zeros((count, half), bool)
    again = np.zeros((count, pairs), bool)
    for t in range(pairs - 1):
        real = ~noisy[:, t]
        again[:, t] = real & came[rows, keys[:, t]]
        came[rows[real], keys[real, t]] = True
    keys[:, -1] = np.argmax(rng.random(came.shape) * came, axis=1)
    again[:, -1] = True

    text = np.stack([keys, values[rows[:, None], keys]], 2)  # [count, pairs, 2]
    if noise:
        text = np.where(noisy[..., None], vocab + rng.integers(0, noise, text.shape), text)
    asked = np.repeat(again, 2, axis=1) & (np.arange(length) % 2 == 1)
    return next_of(text.reshape(count, length), asked | all_asked)


PROTOCOLS = {
    "ci": mad.small(Config(targets="all"), Config()),
    **mad.protocols(
        Config(length=128, targets="all"),
        {"targets": "seen"},
        vocab=(32, 64, 128),
        length=(256, 512, 1024),
        examples=(6400, 3200, 1600, 800),
    ),
}
