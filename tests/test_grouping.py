"""Documents grouped into rows of like work, and how much of it falls on each device."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from seqlab.errors import DataError
from seqlab.models.tokenizer import load_tokenizer
from seqlab.parallel.packing import balanced, hops_needed, most_hops, work
from seqlab.train import grouping
from seqlab.train.corpus import open_corpus
from seqlab.train.data import Data, Loader
from seqlab.train.grouping import grouped
from seqlab.train.sources import Documents, Text

BYTES = load_tokenizer("bytes")
LENGTH, SHARDS = 64, 4


@pytest.fixture
def source(tmp_path) -> Text:
    """Many short documents, some of which are longer than a row."""
    lengths = np.exp(np.random.default_rng(0).normal(2.5, 1.2, 200)).astype(int)
    for i, length in enumerate([*lengths, 64, 63, 62, 1000]):
        text = f"{i:03}" + "abcdefg"[i % 7] * length
        (tmp_path / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return Text((f"{tmp_path}/*.txt",), name="a")


def take(data: Data, count: int, **options) -> np.ndarray:
    with Loader(data, BYTES, **options) as loader:
        return np.array([next(loader) for _ in range(count)])


def documents(tokens: np.ndarray, segment_ids: np.ndarray) -> list[tuple[int, ...]]:
    """The pieces of all rows."""
    rows = zip(tokens, segment_ids, strict=True)
    return [tuple(t[s == i].tolist()) for t, s in rows for i in range(1, s.max() + 1)]


@pytest.mark.parametrize("pool", [2, 64])
def test_every_document_is_seen_once_an_epoch(source, pool, monkeypatch):
    monkeypatch.setattr(grouping, "POOL", pool)
    data = Data((source,), length=LENGTH, batch=1, balance=SHARDS)
    rows = grouped(open_corpus(source, BYTES), LENGTH, SHARDS, data.seed).rows(LENGTH)
    texts = [tuple(BYTES.document(text).tolist()) for text in Documents(source)]
    cut = [
        text[start : start + LENGTH + 1]
        for text in texts
        for start in range(0, len(text) - 1, LENGTH)
    ]
    for epoch in range(2):
        tokens, ids = take(data, rows, start={"a": epoch * rows})[:, :, 0].swapaxes(0, 1)
        assert sorted(documents(tokens, ids)) == sorted(cut)
    here, after = ids[:, :-1], ids[:, 1:]
    corpus = open_corpus(source, BYTES)
    assert ((here == after) & (after > 0)).sum() == corpus.targets  # every prediction once
    assert (ids == 0).mean() < 0.05  # and little padding


def test_rows_follow_from_the_seed_and_the_step_on_any_number_of_hosts(source):
    data = Data((source,), length=LENGTH, batch=4, balance=SHARDS)
    whole = take(data, 30)  # more than an epoch
    np.testing.assert_array_equal(take(data, 30), whole)
    np.testing.assert_array_equal(take(data, 13, start={"a": 4 * 17}), whole[17:])
    halves = [take(data, 30, rows=rows) for rows in ((0, 1), (2, 3))]
    np.testing.assert_array_equal(np.concatenate(halves, 2), whole)
    other = Data((source,), length=LENGTH, batch=4, balance=SHARDS, seed=1)
    assert (take(other, 30) != whole).any()


def test_another_balance_is_another_run(source):
    data = Data((source,), length=LENGTH, batch=4, balance=SHARDS)
    with Loader(data, BYTES) as loader:
        before = json.loads(json.dumps(loader.fingerprint))
    for balance in (None, 2):
        with pytest.raises(DataError, match=r"data\.balance changed"):
            Loader(
                Data((source,), length=LENGTH, batch=4, balance=balance), BYTES, fingerprint=before
            )


def test_rows_and_the_devices_that_share_them_have_like_work(source):
    short = dataclasses.replace(source, files=(source.files[0].replace("*", "[01]*"),))
    corpus, length = open_corpus(short, BYTES), 256
    ours = grouped(corpus, length, SHARDS, 0)

    def pairs(rows) -> np.ndarray:
        """[rows, devices]: how many pairs of tokens attention compares."""
        ids = rows.batch(range(rows.rows(length) - 1), length).segment_ids  # the last is not full
        return np.array([work(np.bincount(row)[1:], length, SHARDS) for row in ids])

    busiest = lambda pairs: pairs.max(1).sum() / pairs.mean(1).sum()
    assert busiest(pairs(ours)) - 1 < 0.6 * (busiest(pairs(corpus)) - 1)
    assert np.std(pairs(ours).sum(1)) < 0.5 * np.std(pairs(corpus).sum(1))


def test_work_is_that_of_counting_pairs():
    lengths = np.array([5, 1, 9, 3])
    position = np.concatenate([np.arange(n) + 1 for n in [*lengths, 0]])
    counted = np.r_[position, np.zeros(24 - 18)].reshape(4, 6).sum(1)
    np.testing.assert_array_equal(work(lengths, 24, 4), counted)
    both = work(np.stack([lengths, lengths[::-1]]), 24, 4)
    np.testing.assert_array_equal(both[0], counted)


def test_a_balanced_order_is_near_the_best_of_all():
    lengths = np.array([40, 30, 8, 8, 6, 4])
    every = np.array(list(itertools.permutations(range(6))))
    busiest = work(lengths[every], 96, 4).max(1)
    order = balanced(lengths, 96, 4)
    assert sorted(order) == list(range(6))
    assert work(lengths[order], 96, 4).max() <= np.quantile(busiest, 0.02)
    np.testing.assert_array_equal(order, balanced(lengths, 96, 4))


def test_hops_are_those_of_the_document_that_spans_most_devices():
    ids = lambda *lengths: np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    assert hops_needed(ids(4, 4, 4, 4), 4) == 0
    assert hops_needed(ids(3, 2, 11), 4) == 2
    assert hops_needed(ids(3, 13), 4) == 3
    assert hops_needed(ids(16), 4) == 3
    assert hops_needed(ids(16), 1) == 0
    assert (
        hops_needed(np.r_[np.ones(5, int), np.zeros(11, int)][None], 4) == 1
    )  # the rest is padding
    assert hops_needed(np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 2, 2]]), 2) == 1
    with pytest.raises(DataError, match="Rows of 16 tokens cannot be split over 3 devices"):
        hops_needed(ids(16), 3)


def test_the_longest_document_bounds_the_hops_wherever_it_lies():
    for longest in range(1, 17):
        found = [
            hops_needed(np.repeat([1, 2, 3], [before, longest, 16 - longest - before])[None], 4)
            for before in range(16 - longest + 1)
            if before == 0 or longest >= before
        ]
        assert max(found) <= most_hops(max(longest, 16 - longest), 16, 4)
    assert most_hops(6, 16, 4) == 2 and most_hops(5, 16, 4) == 1 and most_hops(99, 16, 4) == 3
