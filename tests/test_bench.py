"""`seqlab bench`: what it writes and leaves out, and how it answers bad input. No time counts."""

import json

import jax
import numpy as np
import pytest
import typer.testing
from flax import nnx

from docs import performance
from seqlab import cli
from seqlab.bench import (
    ceilings,
    command,
    families,
    kernels,
    machine,
    models,
    reading,
    record,
    sizes,
    timing,
)
from seqlab.bench.families import Shape
from seqlab.errors import ConfigError, ModelError
from seqlab.kernels.recurrence import RECURRENCES
from seqlab.layers.mixers import gla, lightning
from seqlab.models import lm, summary
from seqlab.train import charts
from seqlab.train import config as runs
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

TINY = ["B=1", "T=16", "H=2", "K=8", "V=8"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(command, "ceilings", lambda: ceilings.ceilings(1, 64))
    monkeypatch.setattr(kernels, "LEAST", 0.0)
    monkeypatch.setattr(charts, "DPI", 30)


def seqlab(*words) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(cli.app, ["bench", *map(str, words)])


def refused(*words) -> str:
    """The sentence with which a command ends."""
    said = seqlab(*words).exception
    assert isinstance(said, ConfigError), said
    return str(said)


def test_a_ratio_is_taken_round_by_round_and_has_quartiles():
    theirs, ours = np.array([2.0, 40.0, 6.0, 8.0, 10.0]), np.array([1.0, 10.0, 2.0, 2.0, 5.0])
    assert timing.ratio(theirs, ours) == (3.0, 2.0, 4.0)  # of 2, 4, 3, 4, 2; of the medians: 4
    row = timing.figure("ratio", timing.ratio(theirs, ours))
    assert row == {"ratio": 3.0, "ratio spread": [2.0, 4.0]}


def test_contestants_take_turns_and_every_other_round_goes_backwards():
    turns = []
    laps = timing.race({name: lambda name=name: turns.append(name) for name in "ab"}, 3)
    assert "".join(turns) == "ab" + "ab" + "ba" + "ab"  # the first round is not measured
    assert {name: len(one.seconds) for name, one in laps.items()} == {"a": 3, "b": 3}


def test_every_combination_of_sizes_is_tried():
    found = sizes.combinations(Shape(), ["T=8,16", "H=1,2"], "shape")
    assert [(s.T, s.H, s.B) for s in found] == [(8, 1, 2), (8, 2, 2), (16, 1, 2), (16, 2, 2)]


def test_a_kernel_is_timed_in_all_its_forms_and_passes(tmp_path):
    family, forms = "linear_scan", ["--form", "reference", "--form", "xla"]
    done = seqlab("kernels", family, *TINY, *forms, "--rounds", 3, "--out", tmp_path)
    assert done.exit_code == 0, done.exception
    name = f"kernels_{family}_{machine.name()}"
    told = json.loads((tmp_path / f"{name}.json").read_text())
    assert {(row["form"], row["pass"]) for row in told["rows"]} == {
        (form, which) for form in ("reference", "xla") for which in (kernels.FORWARD, kernels.BOTH)
    }
    assert told["machine"]["jax"] == jax.__version__ and "load" in told["machine"]
    for row in told["rows"]:
        low, high = row["of the copy spread"]
        assert 0 < low <= row["of the copy"] <= high
        assert row["against xla"] == 1.0 or row["form"] != "xla"
    assert {f.name for f in tmp_path.glob("*.png")} == {f"{name}.png", f"{name}.dark.png"}


def test_bytes_are_arguments_and_results_once_and_products_those_of_the_xla_form():
    (case,) = kernels.cases("ternary_matmul")
    shape = Shape(2, 8, 4, 32, 16)
    arrays = case.arrays(families.Draw(ceilings.operands()), shape)
    one = kernels.program(case, arrays, "reference", kernels.FORWARD)
    rows, wide, out = 2 * 8, 4 * 32, 4 * 16
    assert one.moved == rows * wide + wide // 4 * out + 4 * rows * out
    assert one.flops == 2 * rows * wide * out


def test_with_gradients_arguments_count_twice_and_gradients_once():
    (case,) = kernels.cases("linear_scan")
    arrays = case.arrays(families.Draw(ceilings.operands()), Shape(1, 4, 1, 8, 8))
    one = kernels.program(case, arrays, "xla", kernels.BOTH)
    token, given = 4 * 8 * 4, 2 * 4 * 8 * 4 + 4 + 8 * 4  # of a, b, y; of a, b, reset, state
    assert one.moved == 2 * given + 2 * token + 2 * token  # y, its cotangent, gradients of a and b


def test_every_family_that_is_timed_exists_and_its_arguments_fit():
    for case in families.CASES:
        known = families.implementations(case.family)
        assert {"reference", "xla"} <= set(known)
        assert case.family not in RECURRENCES or RECURRENCES[case.family].__name__ == case.family
        arrays = jax.eval_shape(
            lambda case=case: case.arrays(families.Draw(np.float32), Shape(1, 8, 2, 16, 16))
        )
        for form in ("reference", "xla"):
            jax.eval_shape(lambda *a, f=form, case=case: case.call(*a, implementation=f), *arrays)


def test_training_is_held_against_softmax_attention(tmp_path):
    sizes = ["B=2", "T=16", "D=16", "L=1"]
    done = seqlab("train", "--mixers", "lightning", *sizes, "--rounds", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.exception
    told = json.loads((tmp_path / f"train_{machine.name()}.json").read_text())
    softmax, other = told["rows"]
    assert (softmax["model"], other["model"]) == (models.SOFTMAX, "lightning")
    assert softmax["against softmax"] == 1 and other["against softmax"] > 0
    # three passes of the products of 4 d^2 of projections and a SwiGLU, and of the head, at least
    assert other["operations"] > 3 * 2 * 32 * 16 * (4 * 16 + models.VOCAB)


def test_decoding_tells_states_that_grow_from_those_that_do_not(tmp_path):
    sizes = ["B=2", "T=64,128", "D=16", "L=1"]
    done = seqlab("decode", "--mixers", "lightning", *sizes, "--rounds", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.exception
    name = f"decode_{machine.name()}"
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    state = {(row["model"], row["context"]): row["state bytes"] for row in rows}
    assert state["lightning", 64] == state["lightning", 128]
    grown = state[models.SOFTMAX, 128] - state[models.SOFTMAX, 64]
    assert grown == 64 * 2 * 16 * 4  # keys and values of 64 more tokens in float32
    _, other = models.entered("lightning", models.Size(D=16, L=1))
    weights = 4 * summary.parameter_count(other.config.skeleton())
    assert {r["bytes"] for r in rows if r["model"] == "lightning"} == {
        weights + 2 * 2 * state["lightning", 64]  # two rows, each of them read and written
    }
    assert (tmp_path / f"{name}_state.dark.png").exists()


def test_contexts_that_do_not_fit_are_left_out_and_say_why(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "room", lambda: 2**20)
    sizes = ["B=1", "T=32,4194304", "D=16", "L=1"]
    done = seqlab("decode", "--mixers", "lightning", *sizes, "--rounds", 1, "--out", tmp_path)
    assert done.exit_code == 0, done.exception
    rows = json.loads((tmp_path / f"decode_{machine.name()}.json").read_text())["rows"]
    absent = {(row["model"], row["context"]): row.get("left out", "") for row in rows}
    assert "Out of memory" in absent[models.SOFTMAX, 2**22]
    assert absent[models.SOFTMAX, 32] == absent["lightning", 2**22] == ""


def test_steps_are_timed_behind_the_whole_context_each_time():
    size = models.Size(D=16, L=1, B=2, T=2 * reading.STEPS)
    (softmax, _) = models.entered("lightning", size)
    one = reading.steps(softmax.config, size)
    for _ in range(3):  # NaN ends a row that has no room
        assert one.work().counts.tolist() == [reading.STEPS] * 2
    state = reading.after(softmax.config.build(rngs=nnx.Rngs(0)).init_state(2), 5)
    assert [a.tolist() for a in jax.tree.leaves(state) if a.dtype == np.int32] == [[[5, 5]]]
    with pytest.raises(ModelError, match="raise T"):
        reading.steps(softmax.config, models.Size(D=16, L=1, B=2, T=reading.STEPS - 1))


def test_prompts_are_read_from_the_beginning_each_time(tmp_path):
    sizes = ["B=2", "T=20", "D=16", "L=1", "C=16"]
    done = seqlab("prefill", "--mixers", "lightning", *sizes, "--rounds", 1, "--out", tmp_path)
    assert done.exit_code == 0, done.exception
    size = models.Size(D=16, L=1, B=2, T=20, C=16)
    (softmax, _) = models.entered("lightning", size)
    one = reading.prompt(softmax.config, size)
    assert [one.work().tolist() for _ in range(2)] == [[20, 20], [20, 20]]


def test_a_run_is_held_against_itself_with_softmax_attention():
    pattern = (lightning.Config(heads=2), gla.Config(heads=2))
    model = lm.Config(vocab=64, d_model=16, pattern=pattern, repeats=2)
    data = Data(train=(Tokens(path="none"),), length=24, batch=2)
    plain, own = models.of_run(runs.Config(model=model, data=data, steps=1), "mine")
    assert own == ("mine", model) and plain.label == models.SOFTMAX
    assert [block.mixer for block in plain.config.pattern] == 2 * [models.softmax(16, 24)]
    assert [block.ffn for block in plain.config.pattern] == 2 * [model.ffn]


def test_what_does_not_fit_the_memory_is_a_row_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "room", lambda: 100)
    says = refused("kernels", "linear_scan", *TINY, "--out", tmp_path)
    assert says.startswith("Nothing was measured") and "100 B are free" in says


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["kernels", "delta"], "There is no kernel family 'delta': did you mean 'delta_rule'?"),
        (["kernels", "delta_rule", "--form", "xlo"], "delta_rule has no form 'xlo'"),
        (["kernels", "delta_rule", "S=3"], "no field 'S'"),
        (["kernels", "delta_rule", "T=0"], "T = 0 is wrong"),
        (["train"], "give either --mixers a,b or --config FILE"),
        (["train", "--mixers", "glo"], "There is no mixer 'glo'"),
        (["train", "--mixers", "lightning(heads=3)", "D=16"], "3"),
        (["train", "--config", "none.py"], "none.py"),
        (["train", "--config", "none.py", "D=8"], "leave out D=8"),
        (["decode", "--mixers", "lightning", "S=4"], "no field 'S'"),
        (["prefill", "--mixers", "lightning", "B=x"], "B = 'x' is wrong"),
        (["kernels", "delta", "--tune"], "No GPU kernel is called 'delta'"),
        (["kernels", "delta_rule", "--device", "gpi"], "no kind of device 'gpi'"),
        (["kernels", "delta_rule", "--device", "tpu"], "This machine has no tpu"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence):
    says = refused(*words)
    assert sentence in says and "\n" not in says


def test_a_table_shows_how_far_half_of_the_rounds_lie():
    table = record.table("", [{"a": "x", "ms": 2.0, "ms spread": [1.9, 2.3]}], hidden={"a"})
    assert [str(column.header) for column in table.columns] == ["ms"]
    assert list(table.columns[0].cells) == ["2 ±10%"]


def test_the_page_of_performance_is_that_of_the_results():
    page = performance.PAGE.read_text("utf-8")
    assert page == performance.renewed(page), "run python -m docs.performance"


def test_a_result_is_shown_with_its_verdict_and_what_was_never_measured_says_so(tmp_path):
    machine_here = {"device": "1 x cpu", "jax": "1", "load": 3.5}
    row = {"model": "llama", "tokens a row": 8, "ratio": 0.5, "ratio spread": [0.4, 0.6]}
    told = {"machine": machine_here, "rows": [row]}
    (tmp_path / "training.json").write_text(json.dumps(told))
    text = performance.tables(tmp_path)
    assert "| llama | transformers | a step of training | 8 | 0.50 (0.40-0.60) |" in text
    assert "| 0.9 | **no** |" in text and "0 of 1 hold" in text
    assert "| GPU | not measured |" in text and "| CPU | not measured |" in text
