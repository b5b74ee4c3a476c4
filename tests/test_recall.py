"""Recall over a distance in text: what is asked, what is written to learn it from, what is said."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.errors import DataError
from seqlab.layers.mixers import attention
from seqlab.linearize import recall
from seqlab.models import lm
from seqlab.models.tokenizer import ByteTokenizer
from seqlab.tasks import IGNORE
from seqlab.train.sources import Documents, Jsonl, Text


class WordTokenizer(ByteTokenizer):
    """A token is a word with the space before it, as in most published tokenizers."""

    def encode(self, text: str) -> list[int]:
        words = re.findall(r" ?\w+|\W", text)
        return [sum(ord(letter) * 7**i for i, letter in enumerate(w)) % 256 for w in words]


class LooksBack(lm.LM):
    """Says at every token what stood `distance` tokens before the next."""

    def __init__(self, distance: int, limit: int | None = None):
        self.distance, self.limit = distance, limit

    @property
    def max_length(self):
        return self.limit

    def hidden(self, tokens, state=None, *, reset=None):
        return jnp.roll(tokens, self.distance - 1, axis=1), None

    def logits(self, x):
        return jax.nn.one_hot(x, 257)


BYTES, WORDS = ByteTokenizer(), WordTokenizer()
TEXT = "def f(x):\n    return x + 1\n" * 120


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@pytest.mark.parametrize("distance", recall.DISTANCES)
def test_a_value_is_asked_for_exactly_so_many_tokens_after_it_was_given(distance, tokenizer):
    asked = recall.examples(tokenizer, tokenizer.encode(TEXT), distance, count=6)
    for ids, labels in zip(asked.inputs, asked.labels, strict=True):
        at = np.flatnonzero(labels != IGNORE)
        np.testing.assert_array_equal(ids[at + 1 - distance], labels[at])
        np.testing.assert_array_equal(ids[at[0] - distance], ids[at[0]])  # "="
        assert tokenizer.start == tuple(ids[:1])


def test_each_document_has_as_many_names_and_asks_for_one_of_them():
    asked = recall.examples(BYTES, BYTES.encode(TEXT), 256, count=32)
    places = set()
    for ids in asked.inputs:
        *lines, (name, value) = re.findall(r"\n([a-z]{4}) =(?: (\d\d))?", BYTES.decode(ids))
        names = [name for name, _ in lines]
        assert len(set(names)) == recall.PAIRS and names.count(name) == 1
        assert dict(lines)[name].startswith(value)
        places.add(names.index(name))
    assert len(places) == recall.PAIRS


def test_a_model_that_looks_back_so_far_says_every_value_and_another_says_none():
    said = recall.recall(LooksBack(64), BYTES, BYTES.encode(TEXT), distances=(64, 256), count=9)
    assert said[64] == 1.0 and said[256] == 0.0


def test_a_distance_that_a_model_cannot_hold_is_told_and_not_asked():
    told = []
    model = LooksBack(64, limit=200)
    found = recall.recall(model, BYTES, BYTES.encode(TEXT), count=4, say=told.append)
    assert found == {64: 1.0, 256: None, 900: None}
    assert (
        len(told) == 2 and "900 tokens" in told[1] and "max_length of the model is 200" in told[1]
    )


def test_a_language_model_is_asked_in_one_call():
    config = lm.Config(vocab=257, d_model=8, pattern=(attention.Config(heads=2, window=8),))
    model = config.build(rngs=nnx.Rngs(0))
    found = recall.recall(model, BYTES, BYTES.encode(TEXT), distances=(64,), count=3)
    assert found[64] in (0.0, 1 / 3, 2 / 3, 1.0)


def test_lines_too_long_for_a_distance_and_text_too_short_are_refused():
    with pytest.raises(DataError, match="longer distance"):
        recall.examples(BYTES, BYTES.encode(TEXT), 32, count=1)
    with pytest.raises(DataError, match="more text"):
        recall.examples(BYTES, BYTES.encode(TEXT[:300]), 256, count=1)


@pytest.fixture
def code(tmp_path):
    (tmp_path / "code.py").write_text(TEXT)
    return Text(files=(str(tmp_path / "code.py"),))


def written(code, file, gap, **options):
    recall.write(file, code, documents=5, length=600, gap=gap, seed=3, **options)
    documents = list(Documents(Jsonl(files=(str(file),))))
    assert [len(text) for text in documents] == [600] * 5 and len(set(documents)) == 5
    return documents


def test_what_is_written_says_the_same_value_of_a_name_all_through_a_document(tmp_path, code):
    for text in written(code, tmp_path / "scattered.jsonl", 20):
        lines = re.findall(r"\n([a-z]{4}) = (\d\d)\n", text)
        assert len(set(lines)) == len(dict(lines)) <= recall.PAIRS < len(lines)


def test_far_lines_come_twice_with_a_stretch_in_the_middle(tmp_path, code):
    stretches = []
    for text in written(code, tmp_path / "far.jsonl", 4, far=True):
        lines = list(re.finditer(r"\n([a-z]{4} = \d\d)\n", text))
        for at in range(0, len(lines) - 2 * recall.PAIRS + 1, 2 * recall.PAIRS):
            table = lines[at : at + 2 * recall.PAIRS]
            first, again = table[: recall.PAIRS], table[recall.PAIRS :]
            assert {line[1] for line in first} == {line[1] for line in again}
            stretches.append(again[0].start() - first[-1].end())
    assert min(stretches) < 32 < 128 < max(stretches)


def test_without_a_gap_a_short_piece_is_written_over_and_over(tmp_path, code):
    sizes = set()
    for text in written(code, tmp_path / "copies.jsonl", None):
        sizes.add(next(n for n in range(1, 300) if text == (text[:n] * 600)[:600]))
        assert re.search(r"\n[a-z]{4} = \d\d", text)
    assert len(sizes) > 2


def test_what_is_written_follows_from_its_arguments(tmp_path, code):
    first = written(code, tmp_path / "made" / "recall.jsonl", 20)
    assert written(code, tmp_path / "again.jsonl", 20) == first
    assert written(code, tmp_path / "others.jsonl", 30) != first


def test_text_too_short_to_write_lines_in_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    source = Text(files=(str(tmp_path / "short.txt"),))
    with pytest.raises(DataError, match="5 ASCII characters"):
        recall.write(tmp_path / "recall.jsonl", source, documents=1, length=600, gap=20)
