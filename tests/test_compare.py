"""Mixers compared on a task: what is trained, what is kept, what is drawn, and bad input."""

import dataclasses
import io
import json
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure
from pydantic.dataclasses import dataclass
from rich.console import Console

from benchmarks import tasks
from seqlab import cli, settings
from seqlab.compare import budget, command, entries, labels, published, results, trial
from seqlab.compare.budget import Budget
from seqlab.compare.results import Result, Run
from seqlab.errors import ConfigError
from seqlab.layers import registry
from seqlab.layers.mixer import Mixer
from seqlab.models import lm
from seqlab.tasks import Accuracy, Examples, Protocol, mqar, protocol
from seqlab.train.lock import RunLock

SHORT = mqar.Config(32, 16, 2)
TINY = Protocol(
    train=((SHORT, 64),),
    test=(("24/4", mqar.Config(32, 24, 4), 12), ("16/2", SHORT, 12)),  # longer than trained
    steps=4,
    batch=8,
    lr=(1e-2,),
    conv_first=True,
)
MIXERS = ("linear_attention(heads=2)", "gla(heads=2,decay_rank=4)")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "protocol", lambda task, name: TINY)
        yield


def compare(out, mixers=MIXERS, **options) -> tuple[list[Result], str]:
    said = io.StringIO()
    console = Console(file=said, width=200)
    asked = command.ask("mqar", ",".join(mixers), out=out, width="8", **options)
    return command.compare(asked, console), said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """Two mixers at two rates."""
    out = tmp_path_factory.mktemp("compared")
    return out, *compare(out, lr="1e-2,1e-3")


def untimed(result: Result) -> list[Run]:
    return [dataclasses.replace(run, seconds=0.0, cpu_seconds=0.0) for run in result.runs]


def test_a_comparison_leaves_a_page_its_pictures_and_its_numbers(finished):
    out, found, said = finished
    names = [
        f"{name}{theme}.png"
        for name in ("accuracy_state", "accuracy_length")
        for theme in ("", ".dark")
    ]
    assert all((out / name).stat().st_size > 10_000 for name in names)
    html = (out / "compare.html").read_text("utf-8")
    assert all(text in html for text in (*MIXERS, "24/4", "Zoology", "4 steps"))
    assert re.findall(r' src="(\S+)"', html) == names[::2] and "http" not in html
    rows = json.loads((out / "results.json").read_text("utf-8"))
    assert [settings.read(Result, row) for row in rows] == sorted(found, key=lambda r: -r.accuracy)
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:2]] == list(MIXERS)
    assert lines[2] == str(out / "compare.html") and "\x1b" not in said


def test_the_bytes_of_state_are_those_of_the_state(finished):
    for result in finished[1]:
        model = settings.read(lm.Config, result.model).build(rngs=nnx.Rngs(0))
        state = model.init_state(1)
        assert result.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert result.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_each_rate_is_a_run_and_the_best_one_counts(finished):
    for result in finished[1]:
        assert [(r.lr, r.seed, r.steps) for r in result.runs] == [(1e-3, 0, 4), (1e-2, 0, 4)]
        assert result.runs[0].loss != result.runs[1].loss
        assert result.accuracy == max(run.accuracy for run in result.runs)


def test_what_is_finished_is_kept_and_what_is_missing_is_added(finished, monkeypatch):
    out, found, _ = finished
    monkeypatch.setattr(trial, "make_step", None)  # whatever trains now fails
    again, said = compare(out, lr="1e-2,1e-3")
    assert again == found and said.count("(kept)") == 2
    with pytest.raises(TypeError):
        compare(out, MIXERS[:1], lr="1e-2,3e-3")


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    (again,), _ = compare(tmp_path, MIXERS[:1], seeds=2)
    before = next(result for result in finished[1] if result.label == MIXERS[0])
    assert untimed(again)[0] == untimed(before)[1]
    assert again.runs[1].seed == 1 and again.runs[1].loss != again.runs[0].loss


def test_rates_and_seeds_share_one_program(tmp_path, monkeypatch):
    made, make = [], trial.make_step
    monkeypatch.setattr(trial, "make_step", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    compare(tmp_path, MIXERS[:1], lr="1e-2,1e-3", seeds=2)
    assert [step._cache_size() for step in made] == [1]


def test_another_setting_in_the_same_folder_is_refused(finished):
    with pytest.raises(ConfigError, match=r"result\.json is of another setting"):
        compare(finished[0], budget="5 steps")


def test_a_damaged_result_is_named(finished, tmp_path):
    (entry,) = entries.parse(MIXERS[0], TINY, (8,))
    folder = results.folder(tmp_path, entry)
    folder.mkdir()
    (folder / results.FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"result\.json is damaged: delete it"):
        compare(tmp_path, MIXERS[:1])


def test_what_another_process_trains_is_left_to_it(finished, tmp_path):
    (entry,) = entries.parse(MIXERS[0], TINY, (8,))
    with RunLock(results.folder(tmp_path, entry)):
        found, said = compare(tmp_path, MIXERS[:1])
    assert found == [] and said.startswith(f"{MIXERS[0]}: left to another process")


@dataclass(frozen=True)
class Counter:
    """y_t = n_t x_t, its channels rolled by one; n goes up from `first`."""

    first: float = -3.0

    def build(self, d_model, *, rngs):
        return CounterMixer(self)


class Count(NamedTuple):
    n: jax.Array  # [B]


class CounterMixer(Mixer):
    def __init__(self, config):
        self.first = config.first

    def init_state(self, batch):
        return Count(jnp.full((batch,), self.first))

    def mix(self, x, state, reset):
        n = state.n[:, None] + jnp.arange(x.shape[1])
        return n[..., None] * jnp.roll(x, 1, -1), Count(state.n + x.shape[1])


@pytest.fixture(scope="module", autouse=True)
def counter():
    return registry.register_mixer(Counter, "counter")


def test_a_mixer_that_diverges_is_told_and_the_others_go_on(finished, tmp_path):
    found, said = compare(tmp_path, ("counter(first=nan)", MIXERS[0]))
    broken, whole = found
    assert broken.runs[0].diverged == 1 and broken.runs[0].loss is None
    assert math.isnan(broken.accuracy) and whole.accuracy >= 0
    assert "step 1  loss diverged  accuracy –" in said
    assert "diverged at 1" in (tmp_path / "compare.html").read_text("utf-8")


def test_tests_are_read_in_pieces_as_if_at_once(finished):
    (entry,) = entries.parse("counter", TINY, (8,))
    one = trial.Trial(entry, TINY, Budget(4, "steps"))
    model = entry.model.build(rngs=nnx.Rngs(3))
    tokens = mqar.Config(32, 40, 4).examples(TINY.batch, 0).inputs  # 16, 16 and 8 tokens
    params = trial.parameters(model)
    whole = jnp.argmax(jax.jit(lambda model: model(tokens)[0])(model), -1)
    np.testing.assert_array_equal(one._predicted(params, tokens), whole)


def test_an_epoch_is_all_examples_once_in_batches_of_one_length():
    parts = [
        Examples(np.arange(n)[:, None].repeat(length, 1) + start, np.zeros((n, length)))
        for n, length, start in ((16, 3, 0), (9, 5, 100), (2, 7, 200))
    ]
    feed = trial.batches(parts, 4, seed=1)
    epoch = [next(feed).inputs for _ in range(4 + 2 + 1)]
    first = lambda length: np.sort([b[:, 0] for b in epoch if b.shape[1] == length], axis=None)
    np.testing.assert_array_equal(first(3), np.arange(16))
    assert len(set(first(5))) == 8 and set(first(7)) == {200, 201}
    assert all(batch.shape[0] == 4 for batch in epoch)
    again = trial.batches(parts, 4, seed=1)
    assert all(np.array_equal(batch, next(again).inputs) for batch in epoch)
    assert not np.array_equal(epoch[0], next(trial.batches(parts, 4, seed=2)).inputs)


def test_only_labels_that_are_asked_count_in_the_loss():
    inputs = np.array([[1, 2, 3]], np.int32)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 5)), jnp.float32)
    total = trial.labelled(
        lambda tokens: (logits, None), Examples(inputs, np.array([[-100, 4, -100]]))
    )
    np.testing.assert_allclose(total.nats, -jax.nn.log_softmax(logits[0, 1])[4], rtol=1e-6)
    assert total.tokens == 1


def test_a_run_that_diverged_loses_to_any_other_and_more_seeds_win():
    run = lambda lr, seed, a: Run(lr, seed, 4, 1.0, 1.0, 0.1, {"t": Accuracy(a, a)} if a else {})
    of = lambda *runs: Result("a", 8, {}, {}, 1, 1, runs)
    assert of(run(1.0, 0, None), run(2.0, 0, 0.1)).accuracy == 0.1
    assert (
        of(run(1.0, 0, 0.9), run(1.0, 1, None), run(2.0, 0, 0.5), run(2.0, 1, 0.7)).accuracy == 0.6
    )
    assert of(run(1.0, 0, 0.2), run(1.0, 1, 0.4)).test("t").mean == pytest.approx(0.3)


@pytest.mark.parametrize(
    "text, is_",
    [
        ("600", (600, "steps")),
        ("600 steps", (600, "steps")),
        ("1 step", (1, "steps")),
        ("2M tokens", (2e6, "tokens")),
        ("1.5ktokens", (1500, "tokens")),
        ("90s", (90, "seconds")),
        ("90 seconds", (90, "seconds")),
    ],
)
def test_a_budget_is_read(text, is_):
    assert budget.parse(text) == is_


def test_a_budget_buys_whole_steps_and_at_least_one():
    assert Budget(2500, "tokens").steps(tokens=1000, seconds=math.nan) == 2
    assert Budget(3.0, "seconds").steps(tokens=1000, seconds=0.5) == 6
    assert Budget(1, "tokens").steps(tokens=1000, seconds=math.nan) == 1


def test_fields_of_a_mixer_may_hold_commas():
    text = 'zamba2(inner={"mixer":"gla","heads":2},bias=true), attention ,mlp'
    assert list(entries._cut(text)) == [
        'zamba2(inner={"mixer":"gla","heads":2},bias=true)',
        "attention",
        "mlp",
    ]
    (entry,) = entries.parse("attention(heads=2)", TINY, (8,))
    assert entry.model.pattern[0].heads == 2
    assert entry.model.pattern[0].max_length == 24  # the longest test, and no more
    (entry,) = entries.parse("attention(max_length=30)", TINY, (8,))
    assert entry.model.pattern[0].max_length == 30
    names = [entry.name for entry in entries.parse("gla", TINY, (8, 16))]
    assert names == ["gla @ 8", "gla @ 16"]


@pytest.mark.parametrize(
    "options, says",
    [
        (["nothing", "--mixers", "gla"], "There is no task 'nothing'"),
        (["mqar", "--mixers", "glaa"], "There is no mixer 'glaa'"),
        (["mqar", "--mixers", "gla(headz=2)"], "There is no field 'headz'"),
        (["mqar", "--mixers", "gla(heads=2"], "is not of the form name(field=value, ...)"),
        (["mqar", "--mixers", "gla(heads=3)"], "gla"),
        (["mqar", "--mixers", "gla,gla"], "each once"),
        (["mqar", "--mixers", " , "], "name one or more mixers"),
        (["mqar", "--mixers", "gla", "--protocol", "cj"], "has no protocol 'cj'"),
        (["mqar", "--mixers", "gla", "--budget", "0 steps"], "The budget '0 steps' is not one"),
        (["mqar", "--mixers", "gla", "--budget", "soon"], "The budget 'soon' is not one"),
        (["mqar", "--mixers", "gla", "--lr", "1e-3,fast"], "--lr '1e-3,fast' is not a list"),
        (["mqar", "--mixers", "gla", "--lr", "nan"], "--lr 'nan' is not a list"),
        (["mqar", "--mixers", "gla", "--width", "0"], "--width '0' is not a list"),
    ],
)
def test_bad_input_is_one_sentence(options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "protocol", protocol)
    monkeypatch.setattr("sys.argv", ["seqlab", "compare", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    said = capsys.readouterr().err
    assert exit.value.code == 2 and says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="Cannot write"):
        compare(tmp_path / "out", MIXERS[:1])


def test_published_points_are_shares_by_bytes_or_tokens():
    for task in ("mqar", "induction_heads"):
        for group in published.points(task):
            assert group.against in ("state", "length") and ";" in group.source and group.setting
            points = [point for curve in group.curves.values() for point in curve]
            assert all(x >= 1 and 0 <= accuracy <= 1 for x, accuracy in points)
    assert published.points("parity") == []


def test_names_cover_neither_each_other_nor_points():
    rng = np.random.default_rng(0)
    figure = Figure((8, 5), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1.3), ylim=(0, 1))
    points = rng.uniform(size=(40, 2)) * [1, 0.2] + [0, 0.8]
    named = [labels.Label(f"mixer_{i}", x, y, "black") for i, (x, y) in enumerate(points)]
    labels.write(axes, named, [[point] for point in points])
    boxes = [text.get_window_extent() for text in axes.texts]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(boxes) == 40 and not any(a.overlaps(b) for a, b in pairs)
    pixels = axes.transData.transform(points)
    assert sum(box.contains(*point) for box in boxes for point in pixels) <= 1


def test_a_terminal_gets_a_table_that_lives():
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=120)
    result = Result(
        "gla", 8, {}, {}, 1234, 4096, (Run(1e-2, 0, 4, 2.0, 2.0, 0.5, {"t": Accuracy(0.25, 0.0)}),)
    )
    with command.Board(["gla", "s5"], console) as board:
        board.start("gla", result)
        board.say("gla", 2, 4, 0.75, None)
        assert "2/4" in _shown(board) and "0.750" in _shown(board)
        board.finish("gla", result, again=False)
        assert all(text in _shown(board) for text in ("1.23k", "4 KiB", "0.250", "s5"))


def _shown(board) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(board.table())
    return console.file.getvalue()


def test_the_table_of_all_mixers_has_them_all_and_is_drawn_from_its_rows():
    asked = tasks.entries()
    assert {label.partition("(")[0] for label in asked} == set(registry.own_mixers())
    tests = {tasks.SHORT: Accuracy(0.5, 0.25), tasks.LONG: Accuracy(0.25, 0.0)}
    runs = (Run(1e-2, 0, 4, 2.0, 2.0, 0.5, tests),), (Run(1e-2, 0, 4, 2.0, 2.0, None, {}, 3),)
    whole, broken = (Result("gla", 64, {}, {}, 12, 34, run) for run in runs)
    told = json.loads(json.dumps([tasks.row(whole), tasks.row(broken)], allow_nan=False))
    again, lost = map(tasks.restored, told)
    assert (again.label, again.state_bytes, again.accuracy) == ("gla", 34, whole.accuracy)
    assert math.isnan(lost.accuracy)
