"""MAD's noisy in-context recall (Poli et al., 2024): pairs, with noise to be passed over."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks import mad
from seqlab.tasks.contract import Examples
from seqlab.tasks.mad_in_context_recall import recall


@dataclass(frozen=True, config=STRICT)
class Config:
    """As in `mad_in_context_recall`, of the ids below vocab - noise; a pair is two noise ids
    instead with probability `fraction`, but one pair at least stays."""

    vocab: PositiveInt = 32
    length: Annotated[int, Field(ge=4, multiple_of=2)] = 64
    noise: PositiveInt = 16
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    targets: Literal["seen", "all"] = "seen"

    def __post_init__(self):
        if self.vocab < self.noise + 2:
            raise ConfigError(
                f"mad_noisy_recall: {self.noise} noise ids, a key and a value need "
                f"vocab >= {self.noise + 2}, not {self.vocab}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        clean = self.vocab - self.noise
        every = self.targets == "all"
        return recall(seed, count, self.length, clean, self.noise, self.fraction, all_asked=every)


PROTOCOLS = {
    "ci": mad.small(Config(targets="all"), Config()),
    **mad.protocols(
        Config(length=128, targets="all"),
        {"targets": "seen"},
        vocab=(48, 80, 144),
        length=(256, 512, 1024),
        fraction=(0.4, 0.6, 0.8),
        examples=(6400, 3200, 1600, 800),
    ),
}
