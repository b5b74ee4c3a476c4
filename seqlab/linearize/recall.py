"""Recall over a distance: which value did a line `name = value`, far above, give?

What a softmax layer still sees and a window does not. `write` makes text to learn it from, and
`recall` asks for it; both put the lines between stretches of ordinary text.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.errors import DataError
from seqlab.models.lm import LM
from seqlab.models.tokenizer import Tokenizer
from seqlab.tasks import IGNORE, Examples, accuracy
from seqlab.tasks.draw import distinct
from seqlab.train.sources import Documents, Jsonl, Text

DISTANCES = 64, 256, 900  # tokens from a value to where it is asked for
PAIRS = 4  # names in one document, so that a model cannot do without reading the name
LEAD = 96  # tokens before and with the lines above the one asked for
CHANCE = 1 / PAIRS  # of a model that knows which values the text gave, but not to which name

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_VALUES = 100  # of two digits
_SPARE = 2000  # characters of a text, at its end, where no piece begins
PIECE = 12  # characters of text between the lines of what is to be copied
_ROWS = 8  # that a model reads at once


class Pair(NamedTuple):
    name: str
    value: str


def pairs(rng: np.random.Generator) -> list[Pair]:
    """`PAIRS` different names of two syllables, each with a value of two digits."""
    n = len(_SYLLABLES)
    names = distinct(rng, 1, PAIRS, n * n)[0]
    values = rng.integers(0, _VALUES, PAIRS)
    spell = lambda name: _SYLLABLES[name // n] + _SYLLABLES[name % n]
    return [Pair(spell(a), f"{b:02}") for a, b in zip(names.tolist(), values.tolist(), strict=True)]


def write(
    path: str | pathlib.Path,
    source: Text | Jsonl,
    *,
    documents: int,
    length: int,
    gap: int | None,
    far: bool = False,
    seed: int = 0,
) -> None:
    """JSON lines for `train.sources.Jsonl`: the text of `source` with lines of `pairs` in it.

    A document has `length` ASCII characters and one table of pairs, whose lines come once each and
    then at random, so that all values but the first of each can be told. Between two of them are 0
    to 2 g characters, g being drawn from 0 to `gap` for each document. With `far` it has one table
    after the other, whose lines come twice each, with a stretch of text in the middle that has as
    often 8 to 16 characters as 512 to 1024, up to `length`: of every distance there is something to
    learn from. With gap None a document is one short piece over and over, text and lines: of almost
    every token a model then learns that it can be copied, which it finds out sooner than recall,
    and needs for it. Pieces differ in length, or it would learn to look back so many tokens. The
    file is the same for the same arguments, and stays as it is where it is there already.
    """
    path = pathlib.Path(path)
    if path.exists():
        return
    rng, filler = np.random.default_rng(seed), _ascii(source)
    if len(filler) < length + _SPARE:
        raise DataError(
            f"Source {source.name!r} has {len(filler)} ASCII characters, too few to put around "
            f"recall lines in documents of {length}: give more text."
        )
    kind = _copies if gap is None else _far if far else _scattered
    one = kind if gap is None else functools.partial(kind, gap=gap)
    texts = (one(rng, filler, length)[:length] for _ in range(documents))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    part.rename(path)


def _copies(rng: np.random.Generator, filler: str, length: int) -> str:
    """Up to PAIRS lines with a few characters of text around them, over and over."""
    table = pairs(rng)[: int(rng.integers(1, PAIRS + 1))]
    at, piece = int(rng.integers(len(filler) - _SPARE)), ""
    for line in (*map(_line, table), ""):
        start, at = at, at + int(rng.integers(PIECE))
        piece += filler[start:at] + line
    return piece * length


def _scattered(rng: np.random.Generator, filler: str, length: int, gap: int) -> str:
    """Every line once, then any: in an order of their own, the one before would tell the next."""
    table, at = pairs(rng), int(rng.integers(len(filler) - length + 1))
    first, text, gap = list(table), "", int(rng.integers(gap + 1))
    while len(text) < length:
        start, at = at, at + int(rng.integers(2 * gap + 1))
        pair = first.pop() if first else table[int(rng.integers(PAIRS))]
        text += filler[start:at] + _line(pair) + "\n" * (gap > 0)
    return text


def _far(rng: np.random.Generator, filler: str, length: int, gap: int) -> str:
    """Every line of a table, a stretch of text, and the lines in another order."""
    at, text, gap = int(rng.integers(len(filler) - length + 1)), "", int(rng.integers(gap + 1))
    while len(text) < length:
        table = pairs(rng)
        stretch = int(2 ** rng.uniform(3, math.log2(length)))
        between = [*rng.integers(2 * gap + 1, size=PAIRS), stretch]
        between += rng.integers(2 * gap + 1, size=PAIRS - 1).tolist()
        again = [table[i] for i in rng.permutation(PAIRS)]
        for more, pair in zip(between, [*table, *again], strict=True):
            text += filler[at : at + int(more)] + _line(pair) + "\n" * (gap > 0)
            at += int(more)
    return text


def _line(pair: Pair) -> str:
    return f"\n{pair.name} = {pair.value}"


def _ascii(source: Text | Jsonl) -> str:
    return "".join(Documents(source)).encode("ascii", "ignore").decode()


def examples(
    tokenizer: Tokenizer, filler: Sequence[int], distance: int, count: int, seed: int = 0
) -> Examples:
    """Text, the lines of one table, text, and the name of one line again: its value is asked for.

    The first token of a value is named `distance` tokens after the same token in its line. The
    labels are all tokens of the value, which is read along as it is said: their being all met is
    exactly that greedy decoding would write the value, for up to the first miss it reads the same.

    filler: the ids of a text to take stretches of, one that the model was not trained on.
    Raises DataError where the lines alone are longer than the distance, or the text is too short.
    """
    rng = np.random.default_rng(seed)
    rows = [_example(rng, tokenizer, np.asarray(filler), distance) for _ in range(count)]
    length = max(len(ids) for ids, _ in rows) - 1
    inputs = np.zeros((count, length), np.int32)
    labels = np.full((count, length), IGNORE, np.int32)
    for i, (ids, asked) in enumerate(rows):
        inputs[i, : len(ids) - 1] = ids[:-1]
        labels[i, len(ids) - 1 - asked : len(ids) - 1] = ids[-asked:]
    return Examples(inputs, labels)


def _example(rng, tokenizer: Tokenizer, filler: np.ndarray, distance: int) -> tuple[list[int], int]:
    """The ids of one document that ends with the value asked for, and how many ids that has."""
    encode, table = tokenizer.encode, pairs(rng)
    heads = [encode(f"\n{pair.name} =") for pair in table]
    values = [encode(f" {pair.value}") for pair in table]
    asked = int(rng.integers(PAIRS))
    lines = [head + value for head, value in zip(heads, values, strict=True)]
    need = sum(map(len, lines)) + len(heads[asked]) + 1
    if need > min(distance, LEAD) or LEAD + distance > len(filler):
        raise DataError(
            f"Recall over {distance} tokens does not fit: the lines take {need} of them (at most "
            f"{LEAD}), and of {LEAD + distance} tokens of text {len(filler)} are there: ask over a "
            "longer distance, or give more text."
        )
    above = sum(lines[:asked], []) + heads[asked]
    below = values[asked] + sum(lines[asked + 1 :], []) + encode("\n")
    lead, gap = LEAD - len(above), distance - len(below) - len(heads[asked])
    start = int(rng.integers(len(filler) - lead - gap + 1))
    text = filler[start : start + lead + gap].tolist()
    ids = [*tokenizer.start, *text[:lead], *above, *below, *text[lead:]]
    return ids + heads[asked] + values[asked], len(values[asked])


def recall(
    model: LM,
    tokenizer: Tokenizer,
    filler: Sequence[int],
    *,
    distances: Sequence[int] = DISTANCES,
    count: int = 64,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[int, float | None]:
    """By distance, the share of `examples` of which a model says the whole value.

    A distance that the model cannot hold gives None, and a sentence to `say`. One program is
    compiled for each distance.
    """
    return {d: _over(model, examples(tokenizer, filler, d, count, seed), d, say) for d in distances}


def _over(model: LM, asked: Examples, distance: int, say) -> float | None:
    count, length = asked.inputs.shape
    if model.max_length is not None and length > model.max_length:
        say(
            f"Recall over {distance} tokens is not asked: its documents have {length} tokens, "
            f"and max_length of the model is {model.max_length}."
        )
        return None
    last = int((asked.labels != IGNORE).any(0)[::-1].nonzero()[0][-1]) + 1
    parts = [asked.inputs[i : i + _ROWS] for i in range(0, count, _ROWS)]
    parts = [np.pad(part, ((0, _ROWS - len(part)), (0, 0))) for part in parts]
    said = np.concatenate([_likeliest(model, jnp.asarray(part), last) for part in parts])[:count]
    return accuracy(said, asked.labels[:, -last:]).exact


@functools.partial(jax.jit, static_argnames="last")
def _likeliest(model: LM, tokens: jax.Array, last: int) -> jax.Array:
    """[B, last]: the likeliest id after each of the last tokens."""
    return model.logits(model.hidden(tokens)[0][:, -last:]).argmax(-1)
