"""What a task is: a Config that makes examples, protocols to train and test by, and the score.

A task is a file of this folder with a frozen dataclass `Config`: `vocab`, the number of ids that
a model needs, and `examples(count, seed)`, the same for the same arguments on every machine. Its
`PROTOCOLS` say what is trained on, what is tested, and how; each task has one called "ci", small
enough for a CPU.
"""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple
from typing import Protocol as Shape

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT, PositiveFinite

#: The label of a position that is neither trained nor scored.
IGNORE = -100

#: Examples to be tested are drawn from seeds not below this one; examples to learn from, below.
TEST_SEEDS = 2**31

_PARTS = 2**8  # seeds that one seed of a protocol spans


class Examples(NamedTuple):
    """`labels[i, t]` is what the logits at position t are to say; nothing is shifted."""

    inputs: np.ndarray  # [n, L] int32
    labels: np.ndarray  # [n, L] int32, IGNORE where nothing is asked


class Task(Shape):
    """The Config of a task."""

    @property
    def vocab(self) -> int: ...

    def examples(self, count: int, seed: int) -> Examples: ...


@dataclass(frozen=True, config=STRICT)
class Protocol:
    """How models are compared on a task: its data, and the training published with it.

    Of several `lr`, the best on the tests counts; they fall to `final_lr` times themselves along
    a cosine. `widths` are those of the models compared. With `conv_first` the first layer is a
    gated short convolution and the mixer under test stands in the second alone.
    """

    train: Annotated[tuple[tuple[Any, PositiveInt], ...], Field(min_length=1)]
    test: Annotated[tuple[tuple[str, Any, PositiveInt], ...], Field(min_length=1)]
    steps: PositiveInt
    batch: PositiveInt
    lr: Annotated[tuple[PositiveFinite, ...], Field(min_length=1)]
    weight_decay: NonNegativeFloat = 0.1
    warmup: NonNegativeInt = 0  # steps
    final_lr: NonNegativeFloat = 0.0
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (64,)
    layers: PositiveInt = 2
    ffn: bool = False
    conv_first: bool = False

    @property
    def vocab(self) -> int:
        """The number of ids that a model needs for all of it."""
        return max(config.vocab for config in self._configs())

    @property
    def length(self) -> int:
        """The longest sequence that is trained on or tested."""
        return max(config.length for config in self._configs())

    def training(self, seed: int = 0) -> list[Examples]:
        """What is trained on, one entry a setting, as their lengths differ."""
        base = _first_seed(seed)
        return [task.examples(count, base + i) for i, (task, count) in enumerate(self.train)]

    def testing(self, seed: int = 0) -> list[tuple[str, Examples]]:
        """What is tested, with the label of each setting."""
        base, tests = self.test_seed(seed), enumerate(self.test)
        return [(label, task.examples(count, base + i)) for i, (label, task, count) in tests]

    def test_seed(self, seed: int = 0) -> int:
        """The seed of the first test; those of the others follow it."""
        return TEST_SEEDS + _first_seed(seed)

    def _configs(self) -> Iterator[Any]:
        yield from (task for task, _ in self.train)
        yield from (task for _, task, _ in self.test)


class Accuracy(NamedTuple):
    """The mean over examples of the share of their labels met; the share of examples all met."""

    mean: float
    exact: float


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> Accuracy:
    """The score of predicted ids, [n, L] as their labels; examples that ask nothing are left out.

    Every example counts alike, however many of its positions are asked (Zoology's definition).
    """
    asked = labels != IGNORE
    met = ((predictions == labels) & asked).sum(1)
    of = asked.sum(1)
    met, of = met[of > 0], of[of > 0]
    if not len(of):
        raise ConfigError("No example asks anything: there is no accuracy to take.")
    return Accuracy(float(np.mean(met / of)), float(np.mean(met == of)))


def read_twice(examples: Examples) -> Examples:
    """Context and question, then both again (Arora et al., Just Read Twice, 2024).

    The first reading stops where the first answer of any example is due, so it gives none away.
    """
    asked = (examples.labels != IGNORE).any(0)
    first = examples.inputs[:, : int(asked.argmax()) + 1]
    return Examples(
        np.concatenate([first, examples.inputs], 1),
        np.concatenate([np.full_like(first, IGNORE), examples.labels], 1),
    )


def _first_seed(seed: int) -> int:
    if not 0 <= seed < TEST_SEEDS // _PARTS:
        raise ConfigError(f"The seed {seed} is not between 0 and {TEST_SEEDS // _PARTS - 1}.")
    return seed * _PARTS
