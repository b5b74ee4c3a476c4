"""Sources: files, JSON lines and the standard library, split the same way everywhere."""

import json

import pytest

from seqlab.errors import DataError
from seqlab.models.tokenizer import load_tokenizer
from seqlab.train.corpus import open_corpus
from seqlab.train.sources import STDLIB, Documents, Jsonl, Text, Tokens

BYTES = load_tokenizer("bytes")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_the_split_is_a_partition_by_hash_whatever_the_folder(tmp_path, kind):
    sets = []
    for root in (tmp_path / "x", tmp_path / "y"):
        (root / "deep").mkdir(parents=True)
        texts = [f"document {i}" for i in range(200)]
        for i, text in enumerate(texts):
            (root / "deep" / f"{i}.txt").write_text(text)
        (root / "all.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
        files = (f"{root}/**/*.txt",) if kind == "text" else (f"{root}/all.jsonl",)
        make = Text if kind == "text" else Jsonl
        parts = [make(files, held_out=0.2, part=part) for part in ("train", "held_out")]
        train, held = (set(Documents(part)) for part in parts)
        assert not train & held and train | held == set(texts) and 20 < len(held) < 60
        sets.append(held)
    assert sets[0] == sets[1]


def test_the_standard_library_is_at_hand_and_says_what_it_skips():
    documents = Documents(Text((STDLIB,), held_out=0.05, part="held_out"))
    texts = list(documents)
    assert len(texts) > 10 and sum(map(len, texts)) > 100_000
    assert all("skipped" in note for note in documents.notes())


def test_files_of_other_encodings_in_the_standard_library_are_counted(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("y")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = Documents(Text((STDLIB,)))
    assert list(documents) == ["x = 1\n"]
    assert documents.notes() == [f"{STDLIB}: 1 files were skipped because they are not UTF-8."]


def test_a_file_named_twice_is_read_once_and_empty_ones_of_a_pattern_are_skipped(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    documents = Documents(Text((f"{tmp_path}/b.txt", f"{tmp_path}/*.txt")))
    assert list(documents) == list(documents) == ["b", "a"]
    assert len(documents.notes()) == 1 and "1 files were skipped" in documents.notes()[0]


def _text(folder, content, name="bad.txt"):
    (folder / name).write_bytes(content)
    return f"{folder}/{name}"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda f: Text((_text(f, b"ok \xff"),)), r"bad.txt is not UTF-8 \(byte 3\)"),
        (lambda f: Text((_text(f, b""),)), "bad.txt is empty"),
        (lambda f: Text((f"{f}/none.txt",)), "There is no file"),
        (lambda f: Text((f"{f}/*.none",)), "No file matches"),
        (lambda f: Text((f"{f}/a",)), "is a folder: give a pattern"),
        (lambda f: Text(("python:stdlb",)), "did you mean 'python:stdlib'"),
        (lambda f: Text((f"{f}/a/*.txt",), part="held_out"), "holds no document.*held_out=0.0"),
        (lambda f: Text(()), "names no files"),
        (lambda f: Jsonl((_text(f, b'{"text": "a"}\n{"te'),)), "line 2 is not JSON"),
        (lambda f: Jsonl((_text(f, b'{"txt": "a"}'),)), "no field 'text': did you mean 'txt'"),
        (lambda f: Jsonl((_text(f, b"[1]"),)), "line 1 has no field"),
        (lambda f: Jsonl((_text(f, b'{"text": 3}'),)), "field 'text' is not text"),
        (lambda f: Jsonl((_text(f, b'{"text": "\\ud83c"}'),)), "UTF-16 pair"),
        (lambda f: Jsonl((_text(f, b'{"text": ""}'),)), "holds no document"),
        (lambda f: Text((f"{f}/a/*.txt",), weight=0), "weight.*is 0"),
        (lambda f: Text((f"{f}/a/*.txt",), weight=-1), "weight.*is -1"),
        (lambda f: Tokens("x", weight=float("nan")), "weight.*is nan"),
        (lambda f: Text((f"{f}/a/*.txt",), held_out=1.5), "held_out"),
        (lambda f: Tokens(f"{f}/none"), "There are no token shards"),
    ],
)
def test_unfit_sources_are_one_sentence(tmp_path, build, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("some text")
    with pytest.raises(DataError, match=message) as caught:
        open_corpus(build(tmp_path), BYTES)
    assert "\n" not in str(caught.value)
