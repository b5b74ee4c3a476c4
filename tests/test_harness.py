"""lm-eval-harness: answers are those of a whole forward pass, and of its own path."""

import json
import sys

import jax
import numpy as np
import pytest

from seqlab import cli
from seqlab.evaluate.harness import Answers, adapter
from seqlab.infer.generate import generate
from seqlab.models import store
from seqlab.models.tokenizer import ByteTokenizer
from tests import byte_models, hf_folders


@pytest.fixture(scope="module")
def model():
    return byte_models.heeding()


@pytest.fixture(scope="module")
def short():
    return byte_models.forgetful()


whole = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))


def logs_of(model, ids, count):
    """The log-probabilities of the last `count` ids, and whether they are the likeliest."""
    inputs = np.asarray(ids[:-1])
    padded = np.pad(inputs, (0, (model.max_length or 64) - len(inputs)))[None]
    logs = np.asarray(whole(model, padded))[0, len(ids) - 1 - count : len(ids) - 1]
    last = np.asarray(ids[-count:])
    return logs[np.arange(count), last].sum(), bool((logs.argmax(-1) == last).all())


def test_answers_to_the_harness_are_those_of_a_whole_forward_pass(model):
    answers = Answers(model, ByteTokenizer(), batch=2)
    pairs = [("a cat ", "sat"), ("", "mat")]
    rows = [([256, *b"a cat sat"], 4), ([256, *b"mat"], 3)]
    found = answers.loglikelihood(pairs)
    for (ids, count), (logarithm, greedy) in zip(rows, found, strict=True):
        expected = logs_of(model, ids, count)
        np.testing.assert_allclose(logarithm, expected[0], rtol=1e-5)
        assert greedy == expected[1]
    (rolling,) = answers.loglikelihood_rolling([("the cat sat on",)])
    np.testing.assert_allclose(rolling, logs_of(model, [256, *b"the cat sat on"], 14)[0], rtol=1e-5)


def test_greedy_continuations_are_known_as_such(model):
    answers = Answers(model, ByteTokenizer())
    answers._pair = lambda context, continuation: (continuation, 3)
    ids = generate(model, np.array([256, 97]), steps=3).tolist()
    (_, greedy), (_, other) = answers.loglikelihood(
        [("", [256, 97, *ids]), ("", [256, 97, *ids[:2], (ids[2] + 1) % 256])]
    )
    assert greedy and not other


def test_a_text_longer_than_max_length_is_scored_in_windows(short):
    text = "the cat sat on the mat and thought of many mice and dogs, and of 2 cats."
    ids = [256, *text.encode()]
    (rolling,) = Answers(short, ByteTokenizer()).loglikelihood_rolling([(text,)])
    n = len(text)
    expected = (
        logs_of(short, ids[:33], 32)[0]
        + logs_of(short, ids[32:65], 32)[0]
        + logs_of(short, ids[n - 32 :], n - 64)[0]
    )
    np.testing.assert_allclose(rolling, expected, rtol=1e-5)


def test_generation_for_the_harness_stops_at_its_strings(model):
    answers = Answers(model, ByteTokenizer(), batch=2)
    contexts = ["a cat", "the mat of the dog", "x"]
    free = [
        ByteTokenizer().decode(generate(model, np.array([256, *c.encode()]), steps=70, stop=256))
        for c in contexts
    ]
    options = {"until": [], "max_gen_toks": 70}
    assert answers.generate_until([(c, options) for c in contexts]) == free
    stop = free[0][2:4]
    cut = answers.generate_until([(c, {"until": [stop], "max_gen_toks": 70}) for c in contexts])
    assert cut == [text.partition(stop)[0] for text in free] and len(cut[0]) <= 2


def published(folder, *, begins: bool):
    """A random llama whose tokenizer, if it `begins` texts, sets a mark before them."""
    float32 = {**hf_folders.CONFIG, "torch_dtype": "float32"}
    hf_folders.with_tokenizer(hf_folders.write(folder, float32, hf_folders.llama("float32")))
    if begins:
        mark = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        about = {"id": "<|endoftext|>", "ids": [1], "tokens": ["<|endoftext|>"]}
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [mark, text],
            "pair": [mark, text, text],
            "special_tokens": {"<|endoftext|>": about},
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


CAT = "the cat sat on the mat, the end. "
REQUESTS = {
    "loglikelihood": [
        ("the cat", " sat"),
        ("", "on the mat"),
        ("the cat sat on ", "the mat, the end"),
        (CAT * 9, "the cat"),
        ("the cat", " s"),
    ],
    "loglikelihood_rolling": [(CAT,), (CAT * 20,), ("x",)],
    "generate_until": [
        ("the cat", {"until": ["\n\n"], "max_gen_toks": 16}),
        (CAT, {"until": ["e"], "max_gen_toks": 16}),
        (CAT * 9, {"until": [], "max_gen_toks": 20, "do_sample": False}),
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("begins", [False, True])
def test_answers_are_those_of_the_harness_over_transformers(tmp_path, monkeypatch, begins):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    instance = pytest.importorskip("lm_eval.api.instance")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    folder = published(tmp_path / "llama", begins=begins)
    theirs = huggingface.HFLM(
        pretrained=str(folder), device="cpu", batch_size=2, dtype="float32", max_length=64
    )
    model = store.load(folder)
    ours = adapter(Answers(model, store.load_tokenizer(folder, model), batch=2))
    for kind, arguments in REQUESTS.items():
        made = [instance.Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
        said, expected = getattr(ours, kind)(made), getattr(theirs, kind)(made)
        if kind == "generate_until":
            assert said == expected
        else:
            np.testing.assert_allclose(said, expected, rtol=1e-5)


TASK = """
task: mats
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["mat", "dog"]
doc_to_target: 0
"""


@pytest.mark.filterwarnings("ignore")
def test_the_command_runs_a_task_of_the_harness(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps({"text": f"cat {i} sat on the"}) for i in range(5)]
    (tmp_path / "docs.json").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mats.yaml").write_text(TASK.format(file=tmp_path / "docs.json"))
    folder = store.save(model, tmp_path / "model")
    words = ["--harness", "mats", "--include", str(tmp_path / "tasks"), "--examples", "4"]
    monkeypatch.setattr(sys, "argv", ["seqlab", "eval", str(folder), *words, "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    rows = json.loads(capsys.readouterr().out)["harness"]
    assert {row["metric"] for row in rows} >= {"acc", "acc_norm"}
    answers = Answers(model, ByteTokenizer())
    scores = answers.loglikelihood(
        [(f"cat {i} sat on the ", w) for i in range(4) for w in ("mat", "dog")]
    )
    right = np.mean([scores[2 * i][0] > scores[2 * i + 1][0] for i in range(4)])
    assert next(row["value"] for row in rows if row["metric"] == "acc") == right
