"""What a person sees of `seqlab generate`: the text, the states it saves, and its refusals."""

import io
import json
import os
import pathlib
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.errors import ConfigError, DataError, ModelError
from seqlab.infer import command, text
from seqlab.infer.command import generate
from seqlab.infer.generate import generate as generate_tokens
from seqlab.infer.session import Session
from seqlab.models import store
from seqlab.models.parameters import bind, parameters
from seqlab.models.tokenizer import ByteTokenizer
from tests.leaky import tiny


@pytest.fixture(scope="module")
def writer():
    """A model that writes letters, different ones all the time."""
    model = tiny(seed=3, vocab=257)
    params = parameters(model)
    letters = jnp.zeros(257).at[jnp.arange(ord("a"), ord("z") + 1)].set(1.0)
    return bind(model, {**params, "head.weight": 2 * params["head.weight"] * letters})


@pytest.fixture(scope="module")
def saved(writer, tmp_path_factory):
    return store.save(writer, tmp_path_factory.mktemp("models") / "writer")


@pytest.fixture
def run(capsys, saved):
    """The printed lines and exit status of the command."""

    def run(model=saved, **options):
        status = generate(model, **{"steps": 40, "temperature": 0.7, "top_k": 6, **options})
        return capsys.readouterr().out, status

    return run


def test_the_text_is_what_the_tokens_say(run, writer):
    out, status = run(prompt="hello")
    prompt = ByteTokenizer().prompt("hello")
    tokens = generate_tokens(writer, prompt, steps=40, temperature=0.7, top_k=6)
    assert (out, status) == (ByteTokenizer().decode(tokens) + "\n", 0)
    assert len(set(out)) > 5


def test_a_prompt_from_a_file_or_a_pipe_is_the_same_prompt(run, tmp_path, monkeypatch):
    words = "hel\N{SNOWMAN}lo " * 300
    (tmp_path / "p.txt").write_text(words, encoding="utf-8")
    monkeypatch.setattr(text, "PIECE", 7)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(words.encode())))
    expected = run(prompt=words)
    assert run(prompt_file=str(tmp_path / "p.txt")) == expected
    assert run(prompt_file="-") == expected


def test_the_stop_string_and_what_follows_are_not_printed(run, monkeypatch):
    whole = run(prompt="hello")[0]
    stop = whole[17:21]
    cut = whole[: whole.index(stop)]
    for pace in (0.0, 1e9):  # it spans blocks of one token, or lies within a block
        monkeypatch.setattr(command, "PACE", pace)
        assert run(prompt="hello", stop=stop)[0] == cut + "\n"


@pytest.mark.parametrize("stop", [None, "at a stop string"])
def test_a_saved_state_goes_on_as_if_it_had_never_stopped(run, tmp_path, stop):
    whole = run(prompt="hello", as_json=True)[0]
    tokens = json.loads(whole)["tokens"]
    stop = stop and ByteTokenizer().decode(tokens[17:20])
    first = run(prompt="hello", steps=23, stop=stop, save_state=tmp_path / "s", as_json=True)[0]
    done = json.loads(first)["tokens"]
    assert len(done) == (23 if stop is None else 20)
    rest = run(state=tmp_path / "s", steps=40 - len(done), as_json=True)[0]
    assert done + json.loads(rest)["tokens"] == tokens


def test_a_saved_state_takes_more_prompt_without_a_new_document(run, tmp_path):
    run(prompt="hel", steps=5, temperature=0.0, save_state=tmp_path / "s")
    more = json.loads(run(state=tmp_path / "s", prompt="lo", as_json=True)[0])
    assert more["prompt_tokens"] == 2


def test_json_has_one_object_a_row(run):
    out, _ = run(prompt="hello", batch=3, as_json=True)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert len({row["text"] for row in rows}) == 3
    for row in rows:
        assert row["prompt_tokens"] == 6 and row["finish"] == "length"
        assert len(row["tokens"]) == 40 == len(row["text"])


def test_several_rows_are_printed_under_headers(run):
    out, _ = run(prompt="hello", batch=2, stop="e")
    rows = [
        json.loads(line)
        for line in run(prompt="hello", batch=2, stop="e", as_json=True)[0].splitlines()
    ]
    assert out == "".join(
        f"--- {b}: {row['finish']} ---\n{row['text']}\n" for b, row in enumerate(rows)
    )


def test_text_that_may_begin_the_stop_string_waits():
    row = text.Row(ByteTokenizer().stream(), stop="abab")
    shown = []
    for token in b"xabab":
        row.take([token])
        shown.append(row.ready())
    assert shown == ["x", "", "", "", ""]
    assert (row.text, row.finish, row.tokens) == ("x", "stop", list(b"xabab"))
    row = text.Row(ByteTokenizer().stream(), stop="abab")
    row.take(b"xabay")
    assert row.ready() == "xabay"


def test_an_unfinished_character_waits_and_is_marked_at_the_end():
    row = text.Row(ByteTokenizer().stream())
    row.take("\N{SNOWMAN}".encode()[:2])
    assert row.ready() == ""
    row.close("length")
    assert row.ready() == "\ufffd"


def test_control_c_keeps_what_was_printed_and_saves_the_state(run, tmp_path, monkeypatch):
    whole = run(prompt="hello", steps=900)[0]
    take, calls = text.Row.take, []

    def interrupting(self, tokens):
        calls.append(len(tokens))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, tokens)

    monkeypatch.setattr(text.Row, "take", interrupting)
    handler = signal.getsignal(signal.SIGINT)
    out, status = run(prompt="hello", steps=900, save_state=tmp_path / "s")
    assert status == 130 and len(calls) == 3 and signal.getsignal(signal.SIGINT) is handler
    assert whole.startswith(out[:-1]) and len(out) - 1 == sum(calls)
    assert whole.startswith(out[:-1] + run(state=tmp_path / "s", steps=20)[0][:-1])


def test_a_screen_is_not_controlled_by_the_text(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    command.Terminal().show("\x1b[31mred\x07\n\tend", end="\n")
    assert screen.getvalue() == "\ufffd[31mred\ufffd\n\tend\n"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ConfigError, "There is nothing to continue"),
        ({"prompt": "a", "prompt_file": "b"}, ConfigError, "either --prompt or --prompt-file"),
        ({"prompt": ""}, DataError, "The prompt is empty"),
        ({"prompt_file": "absent.txt"}, DataError, "absent.txt cannot be read"),
        ({"prompt": "a", "steps": 0}, ConfigError, "--steps must be at least 1"),
        ({"prompt": "a", "batch": 0}, ConfigError, "--batch must be at least 1"),
        ({"prompt": "a", "stop": ""}, ConfigError, "The stop string is empty"),
        ({"prompt": "a", "top_p": 3.0}, ConfigError, "top_p must be above 0"),
        ({"prompt": "a", "save_state": pathlib.Path("no/where/s")}, ConfigError, "does not exist"),
        ({"state": pathlib.Path("absent")}, ModelError, "absent cannot be read"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(run, options, error, said):
    with pytest.raises(error, match=said) as refusal:
        run(**options)
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_text_are_refused_by_place(run, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 4)
    path = tmp_path / "p.txt"
    for content, said in (
        (b"", "is empty"),
        (b"\xe2\x98\x83ok\xff", "at byte 5"),
        (b"abc\xe2\x98", "at byte 3"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            run(prompt_file=str(path))


def test_a_text_that_has_ended_needs_a_prompt_to_go_on(run, writer, tmp_path):
    session = Session(writer)
    session.feed([256, 97])
    session.complete(1, stop=int(np.argmax(session.logits)))
    session.save(tmp_path / "s")
    with pytest.raises(ModelError, match="has ended: give a prompt"):
        run(state=tmp_path / "s")
    assert len(run(state=tmp_path / "s", prompt="b", steps=7)[0]) == 8


def test_logits_that_are_not_finite_are_an_error_after_the_text(writer, run, tmp_path, capsys):
    broken = bind(writer, {name: jnp.nan * a for name, a in parameters(writer).items()})
    with pytest.raises(ModelError, match="not finite"):
        run(store.save(broken, tmp_path / "broken"), prompt="a")
    assert capsys.readouterr().out == "\n"


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run, tmp_path):
    with pytest.raises(ModelError, match="has 257 ids but its model's vocabulary is 17"):
        run(store.save(tiny(), tmp_path / "small"), prompt="a")
