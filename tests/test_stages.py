"""Stages of linearization: runs like any other, of a part of the student, beside its teacher."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab import settings
from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError, DataError
from seqlab.layers.mixers import attention, gated_delta_net
from seqlab.linearize import stage as stages
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recipes import METHODS, Lora, Stage
from seqlab.linearize.swap import swap
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters
from seqlab.train import state
from seqlab.train.config import Checkpoint, Mesh, Track
from tests.runs import losses, rows, stored, tiny, write_texts

STEPS, BATCH, LENGTH = 30, 4, 32
FIELDS = {"track": Track(tensorboard=False), "checkpoint": Checkpoint(every=10)}
ROWS = {"length": LENGTH, "batch": BATCH, "schedule": "constant"}
LAYER = Stage("layer", "extra", STEPS * BATCH * LENGTH, lr=2e-2, **ROWS)
LORA = dataclasses.replace(
    LAYER, loss="ce", train="lora", tokens=3 * BATCH * LENGTH, lr=1e-2, lora=Lora(rank=2)
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny(write_texts(tmp_path_factory.mktemp("texts") / "texts")).data


def swapped(preset: str):
    """A teacher of random weights, and a student with another mixer in the place of attention."""
    layer = attention.Config(heads=2, max_length=LENGTH)
    config = lm.Config(vocab=257, d_model=32, pattern=(layer,), repeats=2, ffn=None, remat="none")
    teacher = config.build(rngs=nnx.Rngs(0))
    return swap(teacher, functools.partial(PRESETS[preset], window=4), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def pair():
    return swapped("lolcats")


@pytest.fixture(scope="module")
def run(data):
    """run(pair, stage, folder) -> the pair after it; nothing is held out unless it is evaluated"""
    quiet = {"say": lambda text: None, "evaluate_every": 0} | FIELDS

    def run(pair, stage, folder, **fields):
        here = data if "evaluate_every" in fields else dataclasses.replace(data, held_out=())
        return stages.run(pair, stage, here, folder, **quiet | fields)

    return run


@pytest.fixture(scope="module")
def whole(run, pair, tmp_path_factory):
    """The first stage in one go: its folder, and the pair after it."""
    folder = tmp_path_factory.mktemp("stages") / "1-layer"
    return folder, run(pair, LAYER, folder, evaluate_every=10)


def bits(model) -> dict[str, bytes]:
    return {name: np.asarray(a).tobytes() for name, a in parameters(model).items()}


def test_the_first_stage_halves_the_error_of_every_layer(whole):
    curve = losses(whole[0])
    assert len(curve) == STEPS and curve[-1] < 0.5 * curve[0]
    held_out = [row for row in rows(whole[0]) if "held_out_loss" in row]
    assert [row["step"] for row in held_out] == [10, 20, 30]
    for name in ("held_out_layer", "held_out_layer_0", "held_out_layer_1"):
        assert held_out[-1][name] < held_out[0][name]
    assert all("bits_per_byte" not in row for row in rows(whole[0]))


def test_only_what_trains_changes_and_only_that_is_saved(whole, pair):
    folder, after = whole
    teacher, before, now = map(parameters, (pair.teacher, pair.student, after.student))
    assert after.teacher is pair.teacher and now.keys() == before.keys()
    for name, array in now.items():
        assert not before[name].is_deleted()
        assert (array is before[name]) == (name not in pair.extra), name
        assert name in pair.extra or array is teacher[name]
    assert bits(pair.student) != bits(after.student)
    arrays, metadata = stored(folder, STEPS)
    held = {name.removeprefix("params/student.") for name in arrays if name.startswith("params/")}
    assert held == pair.extra and metadata["step"] == STEPS


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(run, whole, pair, tmp_path, monkeypatch):
    place, batches = state.place, iter(range(10_000))

    def interrupting(batch, mesh):
        if next(batches) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return place(batch, mesh)

    monkeypatch.setattr(state, "place", interrupting)
    with pytest.raises(stages.Stopped, match="not finished") as stopped:
        run(pair, LAYER, tmp_path / "run")
    assert stopped.value.code == 0
    after = run(pair, LAYER, tmp_path / "run")
    assert bits(after.student) == bits(whole[1].student)
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_finished_stage_is_seen_to_be_done(run, whole, pair):
    said = []
    after = run(pair, LAYER, whole[0], evaluate_every=10, say=said.append)
    assert said == [f"{whole[0]} is finished at step {STEPS}."]
    assert bits(after.student) == bits(whole[1].student)
    other = dataclasses.replace(LAYER, loss="hidden")
    with pytest.raises(
        ConfigError, match=r"differs in stage.loss \(was \"layer\", is \"hidden\"\)"
    ):
        run(pair, other, whole[0], evaluate_every=10)


def test_a_second_stage_trains_adapters_and_merges_them(run, whole, tmp_path):
    after = run(whole[1], LORA, tmp_path / "2-ce")
    before, now = parameters(whole[1].student), parameters(after.student)
    assert list(now) == list(before)
    changed = {name for name in now if np.any(np.asarray(now[name] != before[name]))}
    assert changed == {f"blocks.0.mixer.{n}.weight" for n in "qkv"}
    assert losses(tmp_path / "2-ce")[-1] < losses(tmp_path / "2-ce")[0]
    assert "bits_per_byte" in rows(tmp_path / "2-ce")[0]


def test_adapters_stand_beside_whichever_maps_have_the_part_that_is_named():
    pattern = (gated_delta_net.Config(), attention.Config())
    config = lm.Config(vocab=257, d_model=32, pattern=pattern)
    build = lambda: stages.adapted(config.build(rngs=nnx.Rngs(0)), LORA)
    names = {n for n in parameters(jax.eval_shape(build)) if n.endswith(".lora_a")}
    maps = ("0.mixer.qkv", "1.mixer.q", "1.mixer.k", "1.mixer.v")
    assert names == {f"blocks.{name}.lora_a" for name in maps}


def test_a_mesh_trains_a_stage_as_one_device_does(run, whole, pair, tmp_path):
    few = dataclasses.replace(LAYER, tokens=4 * BATCH * LENGTH)
    after = run(pair, few, tmp_path / "two", mesh=Mesh(data=2))
    one, two = np.float32(losses(whole[0])[:4]), np.float32(losses(tmp_path / "two"))
    assert_close(two, one, GRADIENT)
    assert not any(a.is_deleted() for a in parameters(pair.student).values())
    assert not any(a.is_deleted() for a in parameters(pair.student).values())
    places = {a.sharding for a in parameters(after.student).values()}
    assert places == {a.sharding for a in parameters(pair.student).values()}


def test_all_of_a_narrow_student_trains_in_float32_towards_its_teacher(run, tmp_path):
    narrow = lambda model: bind(
        model, {n: a.astype(jnp.bfloat16) for n, a in parameters(model).items()}
    )
    pair = swapped("swa")
    pair = pair._replace(teacher=narrow(pair.teacher), student=narrow(pair.student))
    before = bits(pair.teacher)
    fields = {"loss": "kl", "train": "all", "w_kl": 0.5, "w_ce": 0.25, "lr": 1e-3}
    few = dataclasses.replace(LAYER, tokens=4 * BATCH * LENGTH, **fields)
    after = run(pair, few, tmp_path / "kl", evaluate_every=2)
    assert {a.dtype.name for a in parameters(after.student).values()} == {"bfloat16"}
    assert bits(pair.teacher) == before and bits(after.student) != bits(pair.student)
    assert losses(tmp_path / "kl")[-1] < losses(tmp_path / "kl")[0]
    first = rows(tmp_path / "kl")[0]
    assert first["loss"] == pytest.approx(0.5 * first["kl"] + 0.25 * first["ce"], rel=1e-5)
    assert {"held_out_kl", "held_out_loss"} <= set(rows(tmp_path / "kl")[-1])


def test_what_a_stage_cannot_do_is_one_sentence(run, pair, tmp_path):
    long = dataclasses.replace(LAYER, tokens=10_000_000)
    with pytest.raises(DataError, match="stage a asks for 10,000,000 tokens and the data has"):
        run(pair, long, tmp_path / "a")
    with pytest.raises(ConfigError, match="train='extra' trains nothing here"):
        run(pair._replace(extra=frozenset()), LAYER, tmp_path / "b")
    with pytest.raises(ConfigError, match="length=64 and the teacher holds max_length = 32"):
        run(pair, dataclasses.replace(LAYER, length=64), tmp_path / "c")
    with pytest.raises(ConfigError, match="mesh.groups trains whole models"):
        run(pair, LAYER, tmp_path / "d", mesh=Mesh(seq=2, groups=True))
    with pytest.raises(ConfigError, match="adapters are given where they train"):
        dataclasses.replace(LAYER, train="lora")
    with pytest.raises(ConfigError, match="nothing of what is outside of mixers"):
        dataclasses.replace(LAYER, train="all")


def test_every_recipe_is_plain_data_that_can_be_overridden():
    for name, method in METHODS.items():
        again = settings.read(type(method), settings.plain(method))
        assert again == method, name
    fewer = settings.override(METHODS["lizard"], ["stages.0.tokens=200000", "target=gla"])
    assert fewer.target == "gla" and fewer.stages[0].tokens == 200_000
    assert fewer.stages[0].steps == 13 and fewer.stages[0].optimizer().warmup == 1
    assert set(PRESETS) <= set(METHODS)
