"""Multi-query associative recall (Arora et al., Zoology, 2023): pairs, then keys asked at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT, PositiveFinite
from seqlab.tasks.contract import IGNORE, Examples, Protocol
from seqlab.tasks.draw import distinct, weighted


@dataclass(frozen=True, config=STRICT)
class Config:
    """k1 v1 k2 v2 ... then every key once more; the label at a key asked is its value.

    Keys are different ids of 1 .. vocab/2 - 1, values different ids of the upper half. Slot g of
    two positions after the pairs holds a query with a probability like (g + 1)^(power - 1): most
    come soon. All else is 0, or any id with `random_non_queries`.
    """

    vocab: PositiveInt = 128
    length: PositiveInt = 64
    pairs: PositiveInt = 8
    passes: PositiveInt = 1  # how often the list of pairs is read
    power: PositiveFinite = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        need = 2 * self.pairs * (self.passes + 1)
        if need > self.length:
            raise ConfigError(
                f"mqar: {self.pairs} pairs and their queries need length >= {need}, "
                f"not {self.length}."
            )
        if self.pairs > self.vocab // 2 - 1:
            raise ConfigError(
                f"mqar: {self.pairs} pairs need vocab >= {2 * self.pairs + 2}, not {self.vocab}."
            )

    def examples(self, count: int, seed: int) -> Examples:
        rng, n, half = np.random.default_rng(seed), self.pairs, self.vocab // 2
        keys = 1 + distinct(rng, count, n, half - 1)
        values = half + distinct(rng, count, n, self.vocab - half)
        context = np.stack([keys, values], 2).reshape(count, 2 * n)
        inputs = np.zeros((count, self.length), np.int32)
        start = 2 * n * self.passes
        inputs[:, :start] = np.tile(context, self.passes)
        labels = np.full_like(inputs, IGNORE)
        ask(rng, inputs, labels, keys[..., None], values, start, self.power)
        if self.random_non_queries:
            fill(rng, inputs, self.vocab)
        return Examples(inputs, labels)


def ask(
    rng: np.random.Generator,
    inputs: np.ndarray,
    labels: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    start: int,
    power: float,
) -> None:
    """Write keys [n, pairs, W] into slots of W + 1 positions from `start` on; the label at the
    last token of each is its value."""
    _, pairs, W = keys.shape
    slots = (inputs.shape[1] - start) // (W + 1)
    weights = np.arange(1, slots + 1) ** (power - 1)
    at = start + (W + 1) * weighted(rng, len(inputs), pairs, weights)
    for j in range(W):
        np.put_along_axis(inputs, at + j, keys[..., j].astype(inputs.dtype), 1)
    np.put_along_axis(labels, at + W - 1, values.astype(labels.dtype), 1)


def fill(rng: np.random.Generator, inputs: np.ndarray, vocab: int) -> None:
    """Put any id, drawn anew, wherever there is a 0."""
    empty = inputs == 0
    inputs[empty] = rng.integers(0, vocab, empty.sum())


def _figure2(length: int, pairs: int, batch: int) -> Protocol:
    task = Config(8192, length, pairs, random_non_queries=False)
    return Protocol(
        train=((task, 100_000),),
        test=((f"{length}/{pairs}", task, 3_000),),
        steps=64 * -(-100_000 // batch),
        batch=batch,
        lr=_between(-4, -2),
        widths=(64, 128, 256, 512),
    )


def _between(low: float, high: float) -> tuple[float, ...]:
    return tuple(np.logspace(low, high, 4).tolist())


def _recall() -> Protocol:
    learnt = ((64, 4, 100_000), (128, 8, 20_000), *((256, n, 20_000) for n in (16, 32, 64)))
    asked = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    return Protocol(
        train=tuple((Config(8192, length, n), count) for length, n, count in learnt),
        test=tuple((f"{length}/{n}", Config(8192, length, n), 1_000) for length, n in asked),
        steps=32 * sum(-(-count // 256) for _, _, count in learnt),
        batch=256,
        lr=_between(-3, -1.5),
        widths=(64, 128, 256),
        conv_first=True,
    )


def sweep(config: Callable[..., Any]) -> Protocol:
    """How the variants of this task are swept, `config(length=, pairs=)` being one of theirs."""
    learnt = ((64, 4), (128, 9), (256, 16), (256, 25), (256, 36))
    asked = (*learnt, (512, 64), (1024, 121), (2048, 256))
    make = lambda length, pairs: config(vocab=8192, length=length, pairs=pairs)
    return Protocol(
        train=tuple((make(*size), 20_000) for size in learnt),
        test=tuple((f"{size[0]}/{size[1]}", make(*size), 1_000) for size in asked),
        steps=32 * len(learnt) * -(-20_000 // 256),
        batch=256,
        lr=_between(-3, -1.5),
        widths=(64, 128, 256),
        conv_first=True,
    )


def small(config: Callable[..., Any], pairs: int = 8) -> Protocol:
    """The protocol for a CPU: its tests are as trained, and twice as long."""
    longer = config(length=128, pairs=16)
    return Protocol(
        train=((config(), 8192),),
        test=((f"64/{pairs}", config(), 512), ("128/16", longer, 256)),
        steps=600,
        batch=64,
        lr=(1e-2,),
        conv_first=True,
    )


PROTOCOLS = {
    "ci": small(Config),
    "zoology_recall": _recall(),
    **{
        f"zoology_figure2_{length}": _figure2(length, pairs, batch)
        for length, pairs, batch in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
    },
}
