"""The loader: a position is one integer a source, and everything that follows from that."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydantic
import pytest

from seqlab.errors import DataError, SeqlabError
from seqlab.models.tokenizer import load_tokenizer
from seqlab.train import corpus as corpus_module
from seqlab.train.corpus import open_corpus
from seqlab.train.data import Data, Loader, shuffled
from seqlab.train.held_out import held_out_batches, held_out_text
from seqlab.train.sources import Documents, Jsonl, Text, Tokens

BYTES = load_tokenizer("bytes")
MARK = 256


@pytest.fixture
def folder(tmp_path):
    """Two sources of short documents of different lengths; `a` three times as long as `b`."""
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / name).mkdir()
        for i in range(count):
            text = f"{name}{i} é " * (1 + 7 * i % 11)
            (tmp_path / name / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def mixture(folder, **fields) -> Data:
    sources = [Text((f"{folder}/{n}/*.txt",), weight=w, name=n) for n, w in (("a", 2), ("b", 1))]
    return Data(**{"train": tuple(sources), "length": 16, "batch": 4, "seed": 3} | fields)


def take(loader: Loader, count: int) -> np.ndarray:
    """[count, 2, B, length + 1]: the next batches; the loader is closed."""
    with loader:
        return np.array([next(loader) for _ in range(count)])


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(folder):
    one, two = (take(Loader(mixture(folder), BYTES), 12) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (take(Loader(mixture(folder, seed=4), BYTES), 12) != one).any()


def test_the_order_in_which_sources_are_named_is_no_matter(folder):
    sources = [Text((f"{folder}/{name}/*.txt",), name=name) for name in "ab"]  # equal weights tie
    one, two = (mixture(folder, train=tuple(order)) for order in (sources, sources[::-1]))
    np.testing.assert_array_equal(take(Loader(one, BYTES), 5), take(Loader(two, BYTES), 5))


def test_resuming_anywhere_continues_the_uninterrupted_run(folder):
    data, positions, batches = mixture(folder), [], []
    with Loader(data, BYTES) as loader:
        for _ in range(40):  # several epochs of `b`
            positions.append(json.loads(json.dumps(loader.position)))
            batches.append(next(loader))
        fingerprint = json.loads(json.dumps(loader.fingerprint))
    for at in (0, 1, 7, 23, 39):
        start = Loader(data, BYTES, start=positions[at], fingerprint=fingerprint)
        np.testing.assert_array_equal(take(start, 40 - at), batches[at:])


def test_two_hosts_read_the_two_halves_of_what_one_reads(folder):
    data = mixture(folder)
    whole = take(Loader(data, BYTES), 9)
    loaders = [Loader(data, BYTES, rows=rows) for rows in ((0, 1), (2, 3))]
    halves = [take(loader, 9) for loader in loaders]
    np.testing.assert_array_equal(np.concatenate(halves, 2), whole)
    assert loaders[0].position == loaders[1].position
    resumed = Loader(data, BYTES, start=loaders[0].position)  # on one host
    np.testing.assert_array_equal(take(resumed, 3), take(Loader(data, BYTES), 12)[9:])


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 1000])
def test_an_epoch_is_a_permutation_and_the_next_another(rows):
    epochs = [[shuffled(e * rows + i, rows, seed=1) for i in range(rows)] for e in range(4)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 50 or len(set(map(tuple, epochs))) == 4
    # Seeds and epochs do not alias: the second epoch of one seed is not the first of another.
    assert rows < 50 or epochs[1] != [shuffled(i, rows, seed=2) for i in range(rows)]


def test_every_epoch_shows_every_row_once(folder):
    data = mixture(folder, train=mixture(folder).train[:1], batch=1)
    corpus = open_corpus(data.train[0], BYTES)
    rows = corpus.rows(16)
    expected = corpus.batch(range(rows), 16).tokens
    for epoch in range(2):
        seen = take(Loader(data, BYTES, start={"a": epoch * rows}), rows)[:, 0, 0]
        assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))


def test_sources_keep_their_shares_at_every_moment(folder):
    with Loader(mixture(folder), BYTES) as loader:
        for step in range(1, 400):
            next(loader)
            assert abs(loader.position["a"] - 4 * step * 2 / 3) <= 1
            assert sum(loader.position.values()) == 4 * step


def test_rows_are_windows_of_the_documents_in_order(folder):
    source = mixture(folder).train[0]
    texts = list(Documents(source))
    stream = np.concatenate([BYTES.document(t) for t in texts])
    ids = np.repeat(np.arange(len(texts)), [len(BYTES.document(t)) for t in texts])
    corpus = open_corpus(source, BYTES)
    batch = corpus.batch(range(corpus.rows(16)), 16)
    for i, (tokens, segments) in enumerate(zip(*batch, strict=True)):
        window = stream[16 * i : 16 * i + 17]
        kept = segments > 0
        np.testing.assert_array_equal(tokens[kept], window)
        assert kept.all() or i == len(batch.tokens) - 1
        assert (tokens[~kept] == 0).all()
        own = ids[16 * i : 16 * i + 17]
        np.testing.assert_array_equal(segments[kept], own - own[0] + 1)
    # The last token of a row is the first of the next: every prediction is made once.
    here, after = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    targets = (here == after) & (after > 0)
    assert targets.sum() == corpus.targets == sum(len(t.encode()) + 1 for t in texts)


def test_a_window_may_end_exactly_with_the_data(tmp_path):
    (tmp_path / "x").write_text("a" * 15)  # 17 tokens with its marks
    corpus = open_corpus(Text((f"{tmp_path}/x",)), BYTES)
    assert corpus.rows(16) == 1 and corpus.rows(8) == 2 and corpus.rows(15) == 2
    assert corpus.batch([0], 16).segment_ids.tolist() == [[1] * 17]
    assert corpus.batch([1], 15).segment_ids.tolist() == [[1, 1] + [0] * 14]


def test_bytes_per_token_counts_text_over_predictions(folder):
    data = mixture(folder)
    with Loader(data, BYTES) as loader:
        ratios = []
        for source in data.train:
            sizes = [len(text.encode()) for text in Documents(source)]
            ratios.append(sum(sizes) / (sum(sizes) + len(sizes)))
        assert loader.bytes_per_token == pytest.approx((2 * ratios[0] + ratios[1]) / 3, rel=1e-12)


def test_held_out_batches_are_finite_padded_and_the_same_every_time(folder):
    data = mixture(folder, held_out=mixture(folder).train, held_out_rows=10)
    held_out = held_out_batches(data, BYTES)
    batches = list(held_out)
    assert len(batches) == len(held_out) == 3
    np.testing.assert_array_equal(batches, list(held_out))
    assert (batches[2].segment_ids[2:] == 0).all() and (batches[2].segment_ids[:2] > 0).any()
    every = list(
        held_out_batches(mixture(folder, held_out=data.held_out, held_out_rows=None), BYTES)
    )
    rows = np.concatenate([b.tokens[b.segment_ids[:, 0] > 0] for b in every])
    spread = rows[np.arange(10) * len(rows) // 10]
    np.testing.assert_array_equal(np.concatenate([b.tokens for b in batches])[:10], spread)
    halves = [list(held_out_batches(data, BYTES, rows=rows)) for rows in ((0, 1), (2, 3))]
    np.testing.assert_array_equal(np.concatenate(halves, 2), batches)
    sizes = [len(text.encode()) for source in data.held_out for text in Documents(source)]
    assert held_out.bytes_per_token == sum(sizes) / (sum(sizes) + len(sizes))
    assert not list(held_out_batches(mixture(folder), BYTES))


def test_all_held_out_rows_cover_all_held_out_text(folder):
    data = mixture(folder, held_out=mixture(folder).train, held_out_rows=None)
    tokens, segments = np.concatenate(list(held_out_batches(data, BYTES)), 1)[..., :-1]
    kept = tokens[segments > 0]
    text = held_out_text(data)
    assert kept[kept < 256].astype(np.uint8).tobytes() == text
    assert text == b"".join(t.encode() for s in data.held_out for t in Documents(s))


def test_configs_survive_json(folder):
    adapter = pydantic.TypeAdapter(Data)
    data = mixture(
        folder,
        train=(Jsonl(("x",), field="body"), Tokens("gs://b/c/"), Text(("y",))),
        held_out_rows=None,
    )
    assert adapter.validate_json(adapter.dump_json(data)) == data
    assert [source.name for source in data.train] == ["x", "c", "y"]


def test_unfit_data_is_one_sentence(folder):
    with pytest.raises(DataError, match="less than one batch of 64 x 1000 = 64000"):
        Loader(mixture(folder, batch=64, length=1000), BYTES)
    with pytest.raises(DataError, match="Two sources are named 'a'"):
        mixture(folder, train=mixture(folder).train[:1] * 2)
    with pytest.raises(DataError, match="names no source"):
        mixture(folder, train=())


def test_changed_data_is_refused_on_resume(folder):
    with Loader(mixture(folder), BYTES) as loader:
        before = loader.fingerprint
    for change in ({"length": 8}, {"seed": 9}):
        with pytest.raises(DataError, match=f"data.{next(iter(change))} changed"):
            Loader(mixture(folder, **change), BYTES, fingerprint=before)
    Loader(mixture(folder, batch=2), BYTES, fingerprint=before).close()  # rows stay the same
    (folder / "b" / "03.txt").write_text("another text")
    with pytest.raises(DataError, match="source 'b' changed.*start a new run"):
        Loader(mixture(folder), BYTES, fingerprint=before)


@pytest.mark.parametrize(
    "start, message",
    [
        ({"a": 1}, "no position for source 'b'"),
        ({"a": 1, "b": 1, "bb": 1}, "'bb', which data.train lacks: did you mean 'b'"),
        ({"a": 1, "b": -1}, "not a count of rows"),
        ({"a": 1, "b": 0.5}, "not a count of rows"),
    ],
)
def test_unfit_positions_are_refused(folder, start, message):
    with pytest.raises(SeqlabError, match=message):
        Loader(mixture(folder), BYTES, start=start)


def test_a_failing_read_raises_where_it_is_due_with_its_traceback(folder, monkeypatch):
    data, good = mixture(folder, train=mixture(folder).train[:1]), 5
    expected = take(Loader(data, BYTES), good)
    real = corpus_module.Corpus.batch
    reads = iter(range(1000))

    def fails_later(self, indices, length):
        if next(reads) >= good:
            raise OSError("the disk is gone")
        return real(self, indices, length)

    monkeypatch.setattr(corpus_module.Corpus, "batch", fails_later)
    loader = Loader(data, BYTES)
    monkeypatch.setattr(loader, "_pool", ThreadPoolExecutor(1))  # reads in order
    for batch in expected:
        np.testing.assert_array_equal(next(loader), batch)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(loader)
    assert "fails_later" in [entry.name for entry in caught.traceback]
    assert loader.position == {"a": 4 * good}
    loader.close()


def test_reading_ahead_is_bounded_and_leaves_no_thread(folder):
    before = set(threading.enumerate())
    loader = Loader(mixture(folder), BYTES, prefetch=3)
    next(loader)
    assert set(threading.enumerate()) > before
    assert len(loader._queue) == 3
    loader.close()
    assert set(threading.enumerate()) == before
    assert loader.position["a"] + loader.position["b"] == 4  # rows read ahead do not count
