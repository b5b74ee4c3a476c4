"""How long each mixer trains: steps, tokens or seconds, the same for all."""

import math
import re
from typing import NamedTuple

from seqlab.errors import ConfigError

_FORM = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?) *([kMG]?) *(|s|(?:step|token|second)s?)")
_TIMES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


class Budget(NamedTuple):
    amount: float
    unit: str  # steps, tokens, seconds

    def __str__(self) -> str:
        return f"{self.amount:,.12g} {self.unit}"

    def steps(self, tokens: float, seconds: float) -> int:
        """The steps it buys, at least one, where a step takes so many tokens and seconds."""
        price = {"steps": 1.0, "tokens": tokens, "seconds": seconds}[self.unit]
        return max(1, math.floor(self.amount / price))


def parse(text: str) -> Budget:
    """ "600", "600 steps", "2M tokens" or "90s"; raises ConfigError for anything else."""
    found = _FORM.fullmatch(text.strip())
    amount = float(found[1]) * _TIMES[found[2]] if found else 0.0
    if not found or not 0 < amount < 1e15:
        raise ConfigError(
            f"The budget {text!r} is not one: write steps, tokens or seconds above 0, such as "
            "'600 steps', '2M tokens' or '90s'."
        )
    unit = found[3].rstrip("s") or ("second" if found[3] else "step")
    return Budget(amount, f"{unit}s")
