"""Parity: is the number of ones so far odd? The least that asks for a state that turns over."""

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol


@dataclass(frozen=True, config=STRICT)
class Config:
    """Bits as the ids 1 and 2; the label is 1 + (the sum of the bits so far mod 2).

    It stands at the last `asked` bits, at all of them with None (running parity). A row has
    `shortest` to `length` bits, exactly `length` with None; the rest is padding, 0.
    """

    length: PositiveInt = 24
    shortest: PositiveInt | None = None
    asked: PositiveInt | None = None

    def __post_init__(self):
        if (self.shortest or 1) > self.length:
            raise ConfigError(f"parity: shortest={self.shortest} is above length={self.length}.")

    @property
    def vocab(self) -> int:
        return 3

    def examples(self, count: int, seed: int) -> Examples:
        rng, place = np.random.default_rng(seed), np.arange(self.length)
        bits = rng.integers(0, 2, (count, self.length), dtype=np.int32)
        ends = rng.integers(self.shortest or self.length, self.length + 1, (count, 1))
        inputs = np.where(place < ends, bits + 1, 0).astype(np.int32)
        asked = (place < ends) & (place >= ends - (self.asked or self.length))
        labels = np.where(asked, 1 + np.cumsum(bits, axis=1) % 2, IGNORE).astype(np.int32)
        return Examples(inputs, labels)


PROTOCOLS = {
    "ci": Protocol(
        train=((Config(), 16_384),),
        test=tuple((str(n), Config(length=n, asked=8), 512) for n in (24, 48, 96)),
        steps=600,
        batch=64,
        lr=(3e-3,),
        weight_decay=0.0,
        widths=(32,),
        layers=1,
        ffn=True,
    ),
    "unlocking": Protocol(
        train=((Config(length=40, shortest=3, asked=1), 1_000_000),),
        test=(("40-256", Config(length=256, shortest=40, asked=1), 8_192),),
        steps=20_000,
        batch=256,
        lr=(1e-3,),
        weight_decay=0.0,
        warmup=2_000,
        final_lr=1e-3,
        widths=(128,),
        ffn=True,
    ),
}
