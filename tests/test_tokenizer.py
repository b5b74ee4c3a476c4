"""Tokenizers: exact round trips, document marks, streams of whole characters, refusals."""

import builtins
import json

import numpy as np
import pytest

from seqlab.errors import DataError, ModelError
from seqlab.models import tokenizer as module
from seqlab.models.tokenizer import load_tokenizer
from tests.runs import write_tokenizer

TEXT = "def naïve(): return '中文 🎉'\n\x00<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(params=["bytes", "file"])
def tokenizer(request):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(str(request.getfixturevalue("folder")))


def test_text_survives_encoding(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.document(TEXT)) == TEXT


def test_documents_stand_between_marks_and_text_cannot_forge_one(tokenizer):
    document = tokenizer.document(TEXT)
    assert document.dtype == np.int32
    assert document[0] == document[-1] == tokenizer.stop
    assert document[1:-1].tolist() == tokenizer.encode(TEXT)
    assert tokenizer.stop not in tokenizer.encode(TEXT)
    assert tokenizer.prompt(TEXT) == document[:-1].tolist()
    assert document.min() >= 0 and document.max() < tokenizer.vocab
    for one, many in zip([TEXT, "b"], tokenizer.documents([TEXT, "b"]), strict=True):
        np.testing.assert_array_equal(tokenizer.document(one), many)


def test_byte_ids_are_the_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab, tokenizer.stop) == (257, 256)
    assert tokenizer.document("é").tolist() == [256, 0xC3, 0xA9, 256]
    assert tokenizer.document("").tolist() == [256, 256]
    assert tokenizer.decode([256, 0xC3, 0x28]) == "\ufffd("


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_stream_emits_whole_characters_however_the_ids_are_cut(tokenizer, size):
    ids, stream = tokenizer.prompt(TEXT), tokenizer.stream()
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_a_stream_gives_up_an_unfinished_character_only_at_the_end(tokenizer):
    stream, ids = tokenizer.stream(), tokenizer.encode("a🎉")
    assert stream.push(np.array(ids[:-1])) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("b")) == "b"


def test_garbage_does_not_stall_a_stream(tokenizer):
    continuation = tokenizer.encode("🎉")[-1]
    stream = tokenizer.stream()
    assert len(stream.push([continuation] * 40)) >= 32
    assert stream.push(tokenizer.encode("ok")).endswith("ok")


def test_a_file_tokenizer_does_not_truncate(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    assert len(tokenizer.document("the cat sat on the mat " * 50)) > 100


def test_fingerprints_tell_tokenizers_apart(folder, tmp_path):
    changed = json.loads((folder / "tokenizer.json").read_text()) | {"truncation": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    specs = ["bytes", str(folder), str(tmp_path)]
    assert len({load_tokenizer(spec).fingerprint for spec in specs}) == 3
    assert load_tokenizer("bytes").fingerprint == load_tokenizer("bytes").fingerprint


def test_a_tokenizer_without_marks_adds_none(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 7, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.stop is None and tokenizer.vocab == 8  # ids may have holes
    assert tokenizer.document("a b").tolist() == tokenizer.prompt("a b") == [0, 7]


def test_a_stream_keeps_the_spaces_that_only_neighbours_show(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0, "▁the": 1, "▁cat": 2}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    stream = tokenizer.stream()
    ids = [*tokenizer.prompt("the cat the"), tokenizer.stop, *tokenizer.encode("cat")]
    pieces = [stream.push([i]) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == "the cat the cat"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": 3}', b"\xff", b"[" * 100_000, b'{"version":"1.0"}']
)
def test_a_malformed_file_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match="not a tokenizer.json") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_missing_and_oversized_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="cannot be read.*give 'bytes' or"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    monkeypatch.setattr(module, "LARGEST_FILE", 10)
    (tmp_path / "tokenizer.json").write_text("{" * 11)
    with pytest.raises(ModelError, match="50 MB at most"):
        load_tokenizer(str(tmp_path))


def test_a_missing_package_names_the_extra(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"seqlab\[hf\]"):
        load_tokenizer(str(folder))


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(DataError, match="UTF-16 pair"):
        tokenizer.document("a\ud83c")
    with pytest.raises(DataError, match="UTF-16 pair"):
        tokenizer.prompt("a\ud83c")
