"""`seqlab eval`: what it counts is what the model says when it reads everything at once."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab import cli
from seqlab.errors import ConfigError, DataError, ModelError
from seqlab.evaluate import asked, reading
from seqlab.evaluate.accuracy import score
from seqlab.evaluate.perplexity import perplexity
from seqlab.models import store
from seqlab.models.parameters import bind, parameters
from seqlab.models.tokenizer import ByteTokenizer
from seqlab.tasks import TEST_SEEDS, accuracy, protocol, read_twice, task_config
from seqlab.train.corpus import open_corpus
from seqlab.train.data import Data
from seqlab.train.held_out import held_out_batches
from seqlab.train.sources import Text, Tokens
from seqlab.train.step import make_evaluation
from seqlab.train.tokenize import tokenize
from tests import byte_models
from tests.runs import write_texts


@pytest.fixture(scope="module")
def model():
    return byte_models.heeding()


@pytest.fixture(scope="module")
def short():
    return byte_models.forgetful()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def corpus(texts):
    return open_corpus(Text((f"{texts}/*.txt",), name="cats"), ByteTokenizer())


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 16)


whole = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))


def test_accuracy_is_that_of_a_whole_forward_pass(model, small_chunks):
    examples = task_config("parity", length=43).examples(5, 0)
    said = np.asarray(whole(model, examples.inputs).argmax(-1))
    examples = examples._replace(labels=np.where(examples.inputs == 1, said, examples.labels))
    found = score(model, examples, batch=2)
    assert found == accuracy(said, examples.labels)
    assert 0.2 < found.mean < 1


def test_perplexity_is_that_of_every_document_read_at_once(model, corpus, small_chunks):
    nats = tokens = right = 0
    ends = np.append(corpus.starts[1:], corpus.tokens)
    for ids in corpus.read(list(zip(corpus.starts.tolist(), ends.tolist(), strict=True))):
        padded = np.pad(ids, (0, 1400 - len(ids)))[None]
        logs = np.asarray(whole(model, padded))[0, : len(ids) - 1]
        nats -= logs[np.arange(len(ids) - 1), ids[1:]].sum(dtype=np.float64)
        right += (logs.argmax(-1) == ids[1:]).sum()
        tokens += len(ids) - 1
    for batch in (3, 50):
        found = perplexity(model, corpus, batch=batch)
        assert (found.documents, found.tokens, found.right) == (8, tokens, right)
        np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / corpus.bytes, rel=1e-5)


@pytest.mark.parametrize("length", [32, 8192])
def test_perplexity_in_windows_is_the_held_out_loss_of_training(model, texts, corpus, length):
    text = Text((f"{texts}/*.txt",), name="cats")
    data = Data(train=(text,), held_out=(text,), held_out_rows=None, length=length, batch=4)
    held_out = held_out_batches(data, ByteTokenizer())
    evaluate = make_evaluation(model)
    sums = [evaluate(parameters(model), batch) for batch in held_out]
    loss = sum(float(s.nats) for s in sums) / sum(int(s.tokens) for s in sums)
    found = perplexity(model, corpus, window=length)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    bits = loss / math.log(2) / held_out.bytes_per_token
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    if length == 8192:  # one window holds everything
        np.testing.assert_allclose(perplexity(model, corpus).loss, loss, rtol=1e-5)


def test_token_shards_measure_as_their_text_does(model, texts, corpus, tmp_path):
    tokenize([f"{texts}/*.txt"], str(tmp_path / "shards"), "bytes")
    shards = open_corpus(Tokens(str(tmp_path / "shards")), ByteTokenizer())
    assert perplexity(model, shards) == perplexity(model, corpus)


def test_what_does_not_fit_a_model_is_refused(model, short, corpus):
    with pytest.raises(ModelError, match="An example has 64 tokens and the model's max_length is"):
        score(short, task_config("induction_heads").examples(2, 0))
    with pytest.raises(ModelError, match="max_length is 32: give a window of 32 or fewer"):
        perplexity(short, corpus)
    assert perplexity(short, corpus, window=32).tokens == corpus.targets
    with pytest.raises(ModelError, match="300 ids are needed and the model's vocabulary has 257"):
        score(model, task_config("mqar", vocab=300, pairs=16).examples(64, 0))
    large = task_config("copy").examples(1, 0)
    strange = corpus.__class__(
        corpus.source,
        64,
        64,
        "",
        np.array([0]),
        lambda spans: [large.inputs[0, a:b] + 256 for a, b in spans],
    )
    with pytest.raises(DataError, match="cats holds the id 28. and the model's vocabulary has 257"):
        perplexity(model, strange)
    broken = bind(model, {n: a * jnp.nan for n, a in parameters(model).items()})
    for ask in (lambda: perplexity(broken, corpus), lambda: score(broken, large)):
        with pytest.raises(ModelError, match="logits are not numbers"):
            ask()


def test_reading_twice_gives_no_answer_away():
    examples = task_config("phonebook", entries=4).examples(30, 0)
    inputs, labels = read_twice(examples)
    first = examples.inputs.shape[1] - 9  # up to the blank before the number
    assert np.array_equal(inputs[:, :first], examples.inputs[:, :first])
    assert np.array_equal(inputs[:, first:], examples.inputs)
    assert np.array_equal(labels[:, first:], examples.labels) and (labels[:, :first] < 0).all()


def test_words_name_settings():
    few = asked.parse(["mqar", "length=64,128", "pairs=4,8", "parity:ci", "copy"], seed=3)
    assert [s.label for s in few[:4]] == [
        f"length={length} pairs={pairs}" for length in (64, 128) for pairs in (4, 8)
    ]
    assert few[1].fields["length"] == 64 and few[1].fields["pairs"] == 8
    assert {s.seed for s in few if ":" not in s.task} == {TEST_SEEDS + 3}
    tested = few[4:7]
    assert [(s.label, s.config, s.examples) for s in tested] == list(protocol("parity").test)
    own = [made for _, made in protocol("parity").testing(3)]
    for setting, examples in zip(tested, own, strict=True):
        again = setting.config.examples(setting.examples, setting.seed)
        assert np.array_equal(again.inputs, examples.inputs)
    assert few[7].config == task_config("copy") and few[7].label == ""


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["mqarr"], "There is no task 'mqarr': did you mean 'mqar'?"),
        (["length=3", "mqar"], "length=3 comes before any task: name the task first."),
        (["mqar", "lenght=3"], "There is no field 'lenght': did you mean 'length'?"),
        (["mqar:zoology"], "has no protocol 'zoology'"),
        (["mqar:ci", "length=3"], "drop length=3, or name mqar alone"),
        (["mqar", "length=64,x"], "length = 'x' is wrong"),
    ],
)
def test_words_that_name_nothing_are_refused_in_one_sentence(words, sentence):
    with pytest.raises(ConfigError) as error:
        asked.parse(words)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def run(monkeypatch, capsys):
    """(status, stdout, stderr) of a command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["seqlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_prints_tables_and_json_and_writes_a_file(run, model, texts, tmp_path):
    folder = store.save(model, tmp_path / "model")
    words = ["needle", "length=32,40", "depth=0,1", "parity", "--examples", "4", "--batch", "4"]
    text = ["--text", f"{texts}/*.txt", "--window", "64"]
    status, out, _ = run("eval", folder, *words, *text, "--out", tmp_path / "found.json")
    assert status == 0
    assert "needle: mean accuracy" in out and "depth 0.0" in out and "parity: accuracy" in out
    assert "bits/byte" in out and max(map(len, out.splitlines())) <= 80
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(r["fields"]["length"], r["fields"]["depth"]) for r in found["tasks"][:4]] == [
        (32, 0.0), (32, 1.0), (40, 0.0), (40, 1.0)
    ]  # fmt: skip
    assert found["texts"][0]["documents"] == 8 and found["texts"][0]["window"] == 64
    status, out, _ = run("eval", folder, *words, *text, "--json")
    assert status == 0 and json.loads(out) == found


def test_the_command_refuses_in_one_sentence(run, model, tmp_path):
    folder = store.save(model, tmp_path / "model")
    (tmp_path / "empty.txt").touch()
    for arguments, sentence in (
        ([], "There is nothing to evaluate: give --text"),
        (["mqar", "vocab=8192"], "mqar: 8192 ids are needed and the model's vocabulary has 257"),
        (["--text", tmp_path / "no.txt"], "There is no file"),
        (["--text", tmp_path / "empty.txt"], "is empty"),
        (["--tokens", tmp_path / "none"], str(tmp_path / "none")),
        (["copy", "--out", tmp_path / "no" / "x.json"], "does not exist: create it."),
    ):
        status, out, err = run("eval", folder, *arguments)
        assert status == 2 and sentence in err and out == ""
        assert err.count("\n") == 1 and err.startswith("seqlab: ")
