"""Token shards: the same rows as the text they were made of, or a sentence saying why not."""

import json

import numpy as np
import pytest

from seqlab.errors import DataError
from seqlab.models.tokenizer import load_tokenizer
from seqlab.train.corpus import open_corpus
from seqlab.train.data import Data, Loader
from seqlab.train.held_out import held_out_text
from seqlab.train.sources import Documents, Text, Tokens
from seqlab.train.tokenize import tokenize

BYTES = load_tokenizer("bytes")


@pytest.fixture
def folder(tmp_path):
    """Thirty short documents in `a`, ten in `b`."""
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / name).mkdir()
        for i in range(count):
            document = f"{name}{i} é " * (1 + 7 * i % 11)
            (tmp_path / name / f"{i:02}.txt").write_text(document, encoding="utf-8")
    return tmp_path


def text(folder, name="a") -> Text:
    return Text((f"{folder}/{name}/*.txt",), name=name)


@pytest.fixture
def shards(folder):
    """Token shards of source `a`, and the result of writing them."""
    calls = []
    done = tokenize([f"{folder}/a/*.txt"], f"{folder}/shards", on_progress=calls.append)
    assert calls[-1][:3] == done[:3]
    return f"{folder}/shards", done


def test_shards_equal_the_text_they_were_made_of(folder, shards):
    path, done = shards
    texts = list(Documents(text(folder)))
    sizes = [len(t.encode()) for t in texts]
    assert done[:3] == (30, sum(sizes) + 60, sum(sizes))
    sources = text(folder), Tokens(path, name="a")
    datas = [Data(train=(s,), held_out=(s,), length=16, batch=4) for s in sources]
    with Loader(datas[0], BYTES) as one, Loader(datas[1], BYTES) as other:
        assert one.bytes_per_token == other.bytes_per_token
        assert one.fingerprint == other.fingerprint
        for _ in range(30):
            np.testing.assert_array_equal(next(one), next(other))
    assert held_out_text(datas[1]) == held_out_text(datas[0]) == "".join(texts).encode()


def test_many_blocks_are_written_as_one(folder, monkeypatch):
    monkeypatch.setattr("seqlab.train.shards.SHARD", 128)
    monkeypatch.setattr("seqlab.train.shards.CHUNK", 32)
    monkeypatch.setattr("seqlab.train.sources.TOGETHER", 50)
    (folder / "a" / "zeros.txt").write_text("\0" * 300)  # whole chunks of the fill value
    tokenize([f"{folder}/a/*.txt"], f"{folder}/small")
    small = open_corpus(Tokens(f"{folder}/small"), BYTES)
    whole = open_corpus(text(folder), BYTES)
    assert (small.digest, small.tokens) == (whole.digest, whole.tokens) and small.tokens > 4 * 128
    every = range(whole.rows(16))
    np.testing.assert_array_equal(small.batch(every, 16), whole.batch(every, 16))


def test_shards_live_under_urls_too(folder):
    tokenize([f"{folder}/b/*.txt"], "memory://test/b")
    tokenize([f"{folder}/b/*.txt"], f"file://{folder}/url")
    digest = open_corpus(text(folder, "b"), BYTES).digest
    for path in ("memory://test/b", f"{folder}/url"):
        assert open_corpus(Tokens(path), BYTES).digest == digest


def test_large_vocabularies_take_four_bytes(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.jsonl").write_text('{"body": "a b b a"}\n\n{"body": ""}\n{"body": "b b"}')
    done = tokenize([f"{tmp_path}/x.jsonl"], f"{tmp_path}/out", str(tmp_path), field="body")
    assert done[:3] == (2, 6, 10)
    corpus = open_corpus(Tokens(f"{tmp_path}/out"), load_tokenizer(str(tmp_path)))
    batch = corpus.batch([0], 5)
    assert batch.tokens.tolist() == [[0, 70_000, 70_000, 0, 70_000, 70_000]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2]]


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_no_flipped_bit_changes_a_token(folder, shards):
    path = folder / "shards" / "tokens" / "c" / "0"
    whole = open_corpus(Tokens(shards[0]), BYTES)
    span = [(0, whole.tokens)]
    expected, content = whole.read(span)[0], path.read_bytes()
    for i in range(0, 400, 3):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        try:
            read = open_corpus(Tokens(shards[0]), BYTES).read(span)[0]
        except DataError:
            continue
        np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("array", ["tokens", "starts"])
@pytest.mark.parametrize(
    "harm", [_flip, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink()]
)
def test_damaged_shards_are_named_and_never_read_as_tokens(folder, shards, array, harm):
    path, _ = shards
    harm(folder / "shards" / array / "c" / "0")
    with pytest.raises(DataError, match="damaged.*seqlab tokenize") as caught:
        corpus = open_corpus(Tokens(path), BYTES)
        corpus.batch(range(corpus.rows(16)), 16)
    assert path in str(caught.value)


def _manifest(folder, **changes):
    path = folder / "shards" / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["seqlab"] |= changes
    path.write_text(json.dumps(group))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": 5}, "damaged .tokens has shape"),
        ({"documents": 29}, "damaged .starts has shape"),
        ({"vocab": 100}, "ids outside its 100"),
        ({"version": 2}, "this version of seqlab"),
        ({"tokens": "many"}, "this version of seqlab"),
        ({"tokenizer": "other"}, "made with another tokenizer"),
    ],
)
def test_shards_that_contradict_their_manifest_are_refused(folder, shards, change, message):
    _manifest(folder, **change)
    with pytest.raises(DataError, match=message):
        corpus = open_corpus(Tokens(shards[0]), BYTES)
        corpus.batch(range(corpus.rows(16)), 16)


def test_unfinished_shards_are_refused_and_replaced(folder):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([f"{folder}/a/*.txt"], f"{folder}/cut", on_progress=stop)
    with pytest.raises(DataError, match="unfinished"):
        open_corpus(Tokens(f"{folder}/cut"), BYTES)
    tokenize([f"{folder}/b/*.txt"], f"{folder}/cut")
    assert len(open_corpus(Tokens(f"{folder}/cut"), BYTES).starts) == 10


def test_tokenize_overwrites_nothing(folder, shards):
    for occupied in (shards[0], str(folder)):
        with pytest.raises(DataError, match="is not empty"):
            tokenize([f"{folder}/a/*.txt"], occupied)
    (folder / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be (written|read)"):
        tokenize([f"{folder}/a/*.txt"], f"{folder}/file/below")
    with pytest.raises(DataError, match="not a place that tensorstore can open"):
        tokenize([f"{folder}/a/*.txt"], "nonsense://x")
    with pytest.raises(DataError, match="no token shards"):
        open_corpus(Tokens(f"{folder}/nowhere"), BYTES)
