"""`seqlab linearize`: one small linearization from folder to folder, and what it refuses."""

import io
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import seqlab
from seqlab import cli
from seqlab.errors import ConfigError
from seqlab.evaluate.perplexity import perplexity
from seqlab.layers.mixers import attention
from seqlab.linearize import command, measure, pipeline, report, request, room, sources, stage
from seqlab.linearize.record import Record
from seqlab.models import store
from seqlab.train.corpus import open_corpus
from seqlab.train.sources import Documents, Jsonl, Text, Tokens
from tests.hf_folders import CONFIG, llama, write
from tests.runs import write_texts, write_tokenizer

SMALL = [
    *(f"stages.{n}.{field}" for n in "01" for field in ("tokens=192", "length=32", "batch=2")),
    *("stages.1.lora.rank=2", "window=8"),
]
WINDOW = 32  # tokens in a row of evaluations: as long as those of the stages


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    calm = {name: (a * 0.3).astype(a.dtype) for name, a in llama().items()}
    return write_tokenizer(write(folder, arrays=calm))


@pytest.fixture(scope="module")
def asked(teacher, texts):
    """asked(method, *overrides, ...) -> a request, of all texts, a third of them held out."""

    def asked(method="lizard_rope", *overrides, **options):
        data = [f"{texts}/*.txt"]
        return request.ask(teacher, method, data, share=0.4, overrides=overrides, **options)

    return asked


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    """A linearization in one go: its folder, and what was printed."""
    out, said = tmp_path_factory.mktemp("whole") / "out", io.StringIO()
    console = Console(file=said, width=80)
    command.run(asked("lizard_rope", *SMALL), out, console=console)
    return out, said.getvalue()


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["seqlab", "linearize", *map(str, arguments)])
        cli.main()
    return end.value.code or 0


@pytest.fixture
def refused(teacher, texts, tmp_path, capsys):
    """The one sentence with which a command line is refused, that leaves nothing behind."""

    def refused(*arguments, model=None, data=None, method="lizard_rope", status=2):
        data = ("--data", f"{texts}/*.txt", "--share", 0.4) if data is None else data
        words = (model or teacher, "--method", method, "--out", tmp_path / "out", *data)
        assert run(*words, *arguments) == status
        said = capsys.readouterr().err
        assert said.startswith("seqlab: ") and said.count("\n") == 1, said
        assert not (tmp_path / "out").exists()
        return said

    return refused


def test_the_student_is_a_model_like_any_other(whole):
    out, said = whole
    student = seqlab.load(out)
    tokens = seqlab.generate(student, [3, 4, 5], steps=70)
    assert tokens.shape[-1] == 70 and student.max_length is None
    assert seqlab.load_tokenizer(out).vocab == 273
    assert "stage 2, ce" in said and str(out / "report.html") in said
    assert all(len(line) <= 80 for line in said.splitlines() if "recovered" in line)


def test_every_figure_is_of_the_model_it_names(whole, asked, teacher):
    out, _ = whole
    found = Record(out, asked("lizard_rope", *SMALL))
    assert list(found.figures) == ["teacher", "swap", "baseline", "1-layer", "2-ce"]
    for name, path in (("teacher", teacher), ("2-ce", out)):
        corpus = open_corpus(found.request.held_out[0], store.load_tokenizer(path))
        expected = perplexity(seqlab.load(path), corpus, window=WINDOW).loss
        assert found.figures[name].loss == pytest.approx(expected, rel=1e-5)
    errors = [found.figures[name].transfer for name in ("swap", "1-layer")]
    assert all(errors[1][layer] < errors[0][layer] for layer in (0, 1))
    assert found.figures["2-ce"].tokens == 384 and not found.figures["teacher"].transfer


def test_the_page_shows_what_was_measured(whole, asked):
    out, _ = whole
    page, found = (out / "report.html").read_text(), Record(out, asked("lizard_rope", *SMALL))
    for name in ("recovered", "transfer"):
        assert f"{name}.png" in page and (out / f"{name}.dark.png").stat().st_size > 10_000
    for cells in report.rows(found):
        assert all(cell in page for cell in cells)
    curve = report.curves(found)[0]
    assert curve.xs == (0, *range(64, 192, 64), 192) and len(set(curve.ys)) > 3


def test_a_linearization_that_is_ended_anywhere_goes_on_to_the_same_model(
    whole, asked, tmp_path, monkeypatch
):
    out, ends = tmp_path / "out", [(measure.Judge, "teacher"), (stage, "train"), (store, "save")]
    for place, name in ends:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, _interrupted)
            pipeline.linearize(asked("lizard_rope", *SMALL), out, say=lambda text: None)
        assert not (out / store.INNER).exists()
    record = pipeline.linearize(asked("lizard_rope", *SMALL), out, say=lambda text: None)
    assert record.figures == Record(whole[0], record.request).figures
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (out, whole[0])]
    assert weights[0] == weights[1]


def _interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_finished_linearization_is_left_as_it_is_and_exported(whole, asked, tmp_path):
    out, said = whole[0], []
    before = {path: path.stat().st_mtime_ns for path in (out / "model").iterdir()}
    again = asked("lizard_rope", *SMALL)
    pipeline.linearize(again, out, to=tmp_path / "published", say=said.append)
    assert said[0] == f"{out} is finished." and "published" in said[1]
    assert before == {path: path.stat().st_mtime_ns for path in (out / "model").iterdir()}
    tokens = jnp.asarray(np.arange(40, dtype=np.int32)[None])
    first, second = (seqlab.load(path)(tokens)[0] for path in (out, tmp_path / "published"))
    assert (first == second).all()
    pipeline.linearize(again, out, to=tmp_path / "published", say=said.append)
    assert said[-1].endswith("is there already.")


def test_a_folder_takes_one_linearization_alone(whole, asked, tmp_path):
    with pytest.raises(ConfigError, match=r"differs in stages.0.tokens \(was 192, is 256\)"):
        Record(whole[0], asked("lizard_rope", *SMALL, "stages.0.tokens=256"))
    Record(whole[0], asked("lizard_rope", *SMALL, "mesh.model=2"))  # which changes no result
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no linearization"):
        Record(tmp_path, asked("lizard_rope", *SMALL))


def test_what_would_be_done_is_told_and_nothing_is(asked, tmp_path):
    file = io.StringIO()
    console = Console(file=file, width=80)
    command.run(asked("lolcats", *SMALL, keep="0"), tmp_path / "out", dry=True, console=console)
    said = " ".join(file.getvalue().split())
    assert "0 stay as they are" in said and "1 attention becomes lolcats" in said
    # for each of 2 heads two feature maps of 8 x 8, and a factor
    assert "parameters added 258 " in said and "1 layer extra 258 192 3 2 x 32 0.01" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ligre"}, "There is no method 'ligre': did you mean 'liger'?"),
        ({"method": "lizard --mixer mambo"}, "There is no mixer 'mambo': did you mean 'mamba'?"),
    ],
)
def test_what_there_is_not_is_one_sentence(refused, options, message):
    method, _, words = options["method"].partition(" ")
    assert message in refused(*words.split(), method=method)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--keep 7", "There is no layer 7 to keep: the model has 2"),
        ("--keep one", "--keep 'one' is not a list of layers"),
        ("--keep-every 1", "All 2 layers of full softmax attention are kept"),
        ("windw=8", "There is no field 'windw': did you mean 'window'?"),
        ("stages.0.tokns=8", "There is no field 'stages.0.tokns': did you mean 'tokens'?"),
        ("more.txt", "'more.txt' is not of the form name=value: a file takes an option"),
        ("stages.0.tokens=9000000", "asks for 9,000,000 tokens and the data has"),
        ("stages.0.length=128", "length=128 and the teacher holds max_length = 64 tokens"),
        ("mesh.data=3", "does not divide over mesh.data = 3 devices"),
        ("--mixer gated_delta_net value_dim=5", "gated_delta_net cannot take over the teacher's v"),
        ("--method hedgehog --mixer swa", "train='extra' trains nothing here"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(refused, words, message):
    small = [word for word in SMALL if "--mixer gated" not in words or word != "window=8"]
    assert message in refused(*small, *words.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "whale"}, "no model of type 'whale' can be read; known types are bamba"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized ('gptq')"),
        ({"model_type": "mistral", "sliding_window": 8}, "no layer of full softmax attention"),
        ({"vocab_size": 270}, "has 273 ids but its model's vocabulary is 270"),
    ],
)
def test_a_teacher_that_will_not_do_is_one_sentence(refused, tmp_path, change, message):
    arrays = llama() if "vocab_size" not in change else _with_fewer_ids(270)
    folder = write_tokenizer(write(tmp_path / "teacher", CONFIG | change, arrays))
    assert message in refused(model=folder)


def _with_fewer_ids(count: int):
    return {name: a[:count] if len(a) == CONFIG["vocab_size"] else a for name, a in llama().items()}


def test_weights_that_may_be_pickles_are_refused(refused, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refused(model=folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["--data", "nowhere.txt"], "There is no file 'nowhere.txt'"),
        (["--data", "."], "Token shards such as '.' are not split"),
        (["--data", "{texts}/0.txt"], "leaves none to train on or none to evaluate with"),
        (["--data", "{texts}/0.txt", "--held-out", "no.txt"], "There is no file 'no.txt'"),
    ],
)
def test_data_that_will_not_do_is_one_sentence(refused, texts, data, message):
    assert message in refused(*SMALL, data=[word.format(texts=texts) for word in data])


def test_shards_of_another_tokenizer_are_refused(refused, texts, tmp_path):
    from seqlab.train.tokenize import tokenize

    tokenize([f"{texts}/*.txt"], str(tmp_path / "shards"))
    data = "--data", tmp_path / "shards", "--held-out", tmp_path / "shards"
    assert "were made with another tokenizer (of 257 ids" in refused(*SMALL, data=data)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_trained(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 100))
    assert "has 100 B free, and checkpoints, the result and its export take" in refused(*SMALL)


def test_room_counts_what_is_there_and_all_folders_of_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 100))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "held").write_bytes(bytes(50))
    room.require({tmp_path / "a": 110, tmp_path / "b": 40})
    with pytest.raises(ConfigError, match="has 100 B free"):
        room.require({tmp_path / "a": 110, tmp_path / "b": 41})
    # two stages of 10 and 20 numbers of 12 bytes: two checkpoints of each, and one more
    assert room.checkpoints([10, 20]) == 12 * (2 * 10 + 2 * 20 + 20)


def test_words_are_read_as_the_sources_they_are(tmp_path):
    (tmp_path / "shards").mkdir()
    words = ["a/*.txt", "b.jsonl", str(tmp_path / "shards"), "c.md", "gs://bucket/shards"]
    assert sources.named(words, "content") == (
        Text(("a/*.txt", "c.md")),
        Jsonl(("b.jsonl",), "content"),
        Tokens(str(tmp_path / "shards")),
        Tokens("gs://bucket/shards"),
    )


def test_what_is_held_out_is_never_trained_on(texts):
    parts = sources.split([Text((f"{texts}/*.txt",))], 0.4)
    read = [set(Documents(one)) for (one,) in parts if isinstance(one, Text)]
    assert len(read) == 2 and all(read) and not read[0] & read[1] and len(read[0] | read[1]) == 8


def test_every_nth_layer_can_stay_beside_those_that_are_named(asked):
    assert asked("liger", keep="0,5", keep_every=4).kept(9) == {0, 3, 5, 7}


def test_the_baseline_keeps_as_many_keys_as_the_student():
    teacher = attention.Config(head_dim=8)
    for window, sinks, own in ((8, 0, 4), (60, 4, 60), (None, 0, 60)):
        mixer = attention.Config(window=window, sinks=sinks)
        found = pipeline.window_and_sinks(mixer)(teacher)
        assert (found.window, found.sinks) == (own, 4)
