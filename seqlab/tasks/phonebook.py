"""A phone book (Jelassi et al., Repeat After Me, 2024), in ASCII: whose number is it?

The ids are bytes, so that a language model over bytes is asked as it stands.
"""

from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from seqlab.settings import STRICT
from seqlab.tasks.contract import IGNORE, Examples, Protocol
from seqlab.tasks.draw import distinct

_CONSONANTS = np.frombuffer(b"bdfgklmnprstvz", np.uint8).astype(np.int32)
_VOWELS = np.frombuffer(b"aeiou", np.uint8).astype(np.int32)
_DIGITS = 10  # of a number; the first is one of 6 to 9
_NAME = len("Bako Temi")
_LINE = _NAME + len(": ") + _DIGITS + len("\n")


@dataclass(frozen=True, config=STRICT)
class Config:
    """`entries` lines like "Bako Temi: 6123456789", two of them again, then a name and its colon.

    The labels are the digits of that name's number, which is read along as it is said.
    """

    entries: Annotated[int, Field(ge=3)] = 4

    @property
    def vocab(self) -> int:
        return 128

    @property
    def length(self) -> int:
        return _LINE * (self.entries + 3) - len("0\n")

    def examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        book = self._book(rng, count)
        again = distinct(rng, count, 3, self.entries)  # two as examples, the third is asked
        shown = np.take_along_axis(book, again[..., None], 1)
        text = np.concatenate([book, shown], 1).reshape(count, -1)
        text = text[:, : self.length + 1].astype(np.int32)  # up to the last digit
        inputs = text[:, :-1]
        labels = np.full_like(inputs, IGNORE)
        labels[:, -_DIGITS:] = text[:, -_DIGITS:]
        return Examples(inputs, labels)

    def _book(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """[count, entries, _LINE]: lines of which no two have the same name."""
        n = self.entries
        consonants, vowels = len(_CONSONANTS), len(_VOWELS)
        kinds = (consonants, vowels) * 4
        names = distinct(rng, count, n, int(np.prod(kinds)))
        letters = np.stack(np.unravel_index(names, kinds), -1)  # [count, n, 8]
        letters = np.where(
            np.arange(8) % 2 == 0, _CONSONANTS[letters % consonants], _VOWELS[letters % vowels]
        )
        letters[..., [0, 4]] -= ord("a") - ord("A")
        digits = ord("0") + rng.integers(0, 10, (count, n, _DIGITS))
        digits[..., 0] = ord("0") + rng.integers(6, 10, (count, n))
        put = lambda text: np.broadcast_to(np.frombuffer(text, np.uint8), (count, n, len(text)))
        parts = [letters[..., :4], put(b" "), letters[..., 4:], put(b": "), digits, put(b"\n")]
        return np.concatenate(parts, -1)


PROTOCOLS = {
    "ci": Protocol(
        train=((Config(), 16_384),),
        test=tuple((str(n), Config(n), 256) for n in (4, 8, 16)),
        steps=1_000,
        batch=32,
        lr=(3e-3,),
    ),
}
