"""Modular arithmetic (Deletang et al., 2022): the value of digits joined by +, - and *."""

from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol

PAD, PLUS, MINUS, TIMES, EQUALS = range(5)
DIGIT = 5  # the id of the digit 0


@dataclass(frozen=True, config=STRICT)
class Config:
    """An expression and "="; the one label, there, is its value modulo `modulus`, a digit.

    * binds more than + and -. With `brackets`, every operation stands in them, whose ids follow
    those of the digits. Rows have between `shortest` and `length` ids; the rest is padding, 0.
    """

    length: Annotated[int, Field(ge=2)] = 40
    shortest: Annotated[int, Field(ge=2)] = 3
    modulus: Annotated[int, Field(ge=2)] = 5
    brackets: bool = False

    def __post_init__(self):
        if not self._sizes():
            raise ConfigError(
                f"modular_arithmetic: no expression has between shortest={self.shortest} and "
                f"length={self.length} ids: widen the range to hold one of "
                f"{self._ids(1)}, {self._ids(2)}, {self._ids(3)}, ..."
            )

    @property
    def vocab(self) -> int:
        return DIGIT + self.modulus + 2 * self.brackets

    def examples(self, count: int, seed: int) -> Examples:
        rng, sizes = np.random.default_rng(seed), self._sizes()
        inputs = np.full((count, self.length), PAD, np.int32)
        labels = np.full_like(inputs, IGNORE)
        for row, size in enumerate(rng.choice(sizes, count)):
            ids, value = self._bracketed(rng, size) if self.brackets else self._plain(rng, size)
            inputs[row, : len(ids) + 1] = [*ids, EQUALS]
            labels[row, len(ids)] = DIGIT + value
        return Examples(inputs, labels)

    def _ids(self, digits: int) -> int:
        """How many ids an expression of so many digits has, with "="."""
        return digits + (3 if self.brackets else 1) * (digits - 1) + 1

    def _sizes(self) -> list[int]:
        """How many digits there may be."""
        digits = range(1, self.length)
        return [n for n in digits if self.shortest <= self._ids(n) <= self.length]

    def _plain(self, rng: np.random.Generator, size: int) -> tuple[list[int], int]:
        digits = rng.integers(0, self.modulus, size).tolist()
        signs = rng.integers(PLUS, TIMES + 1, size - 1).tolist()
        ids, total, term = [DIGIT + digits[0]], 0, digits[0]
        for sign, digit in zip(signs, digits[1:], strict=True):
            ids += [sign, DIGIT + digit]
            if sign == TIMES:
                term = term * digit % self.modulus
            else:
                total, term = total + term, digit if sign == PLUS else -digit
        return ids, (total + term) % self.modulus

    def _bracketed(self, rng: np.random.Generator, size: int) -> tuple[list[int], int]:
        if size == 1:
            digit = int(rng.integers(self.modulus))
            return [DIGIT + digit], digit
        left = int(rng.integers(1, size))
        a, x = self._bracketed(rng, left)
        b, y = self._bracketed(rng, size - left)
        sign = int(rng.integers(PLUS, TIMES + 1))
        value = {PLUS: x + y, MINUS: x - y, TIMES: x * y}[sign] % self.modulus
        opening = DIGIT + self.modulus
        return [opening, *a, sign, *b, opening + 1], value


def _protocol(train: Config, count: int, test: tuple[str, Config, int], **fields) -> Protocol:
    return Protocol(train=((train, count),), test=(test,), weight_decay=0.0, ffn=True, **fields)


def _published(brackets: bool) -> Protocol:
    return _protocol(
        Config(brackets=brackets),
        1_000_000,
        ("40-256", Config(256, 40, brackets=brackets), 8_192),
        steps=20_000,
        batch=256,
        lr=(1e-3,),
        warmup=2_000,
        final_lr=1e-3,
        widths=(128,),
    )


PROTOCOLS = {
    "ci": _protocol(
        Config(16), 16_384, ("16-32", Config(32, 16), 512), steps=1_000, batch=64, lr=(3e-3,)
    ),
    "unlocking": _published(False),
    "unlocking_brackets": _published(True),
}
