"""Training: the same bits however often it is interrupted; nothing lost when things go wrong."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from seqlab import settings
from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import CheckpointError, ConfigError, DataError, NumericalError
from seqlab.layers.mixers import mamba2
from seqlab.models import artifacts, lm, store
from seqlab.models.parameters import parameters
from seqlab.parallel import use_mesh
from seqlab.train import sinks, state, step
from seqlab.train.config import Checkpoint, Mesh, Optimizer, Track
from seqlab.train.corpus import Batch
from seqlab.train.lock import FILE as LOCK
from seqlab.train.loop import train
from tests.runs import losses, quick, rows, stored, write_texts, write_tokenizer

CONFIG_FILE = """
import pathlib
from tests import leaky
from tests.runs import quick
config = quick(pathlib.Path({texts!r}))
"""

#: The command line, with signals sent to itself when it places a batch (one of them is held out).
FAULTY = """
import os, pathlib, signal, sys, time
from seqlab.cli import main
from seqlab.train import state
at, signals = int(sys.argv.pop(1)), [int(n) for n in sys.argv.pop(1).split(",")]
checkpoint = pathlib.Path(sys.argv[-1], "checkpoints", "15")
place, batches = state.place, iter(range(10_000))
def faulty(batch, mesh):
    if next(batches) == at:
        while not checkpoint.exists():  # it is written in the background
            time.sleep(0.01)
        for number in signals:
            os.kill(os.getpid(), number)
    return place(batch, mesh)
state.place = faulty
main()
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """40 steps in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    outcome = train(quick(texts), folder, say=lambda text: None)
    assert (outcome.step, outcome.finished, outcome.trained) == (40, True, True)
    return folder


@pytest.fixture(scope="module")
def interrupted(texts, tmp_path_factory):
    """name -> (folder, exit status, stderr) of runs that got signals in their 18th step."""
    base = tmp_path_factory.mktemp("interrupted")
    (base / "quick.py").write_text(CONFIG_FILE.format(texts=str(texts)))
    signals = {
        "killed": [signal.SIGKILL],
        "asked": [signal.SIGTERM],
        "pressed": [signal.SIGTERM] * 2,
    }
    processes = {}
    for name, numbers in signals.items():
        numbers = ",".join(str(int(number)) for number in numbers)
        command = [sys.executable, "-c", FAULTY, "18", numbers]
        command += [
            "train",
            str(base / "quick.py"),
            "checkpoint.every=15",
            "--out",
            str(base / name),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes[name] = subprocess.Popen(command, text=True, **pipes)
    ends = {
        name: (*process.communicate(), process.returncode) for name, process in processes.items()
    }
    return {name: (base / name, code, out + err) for name, (out, err, code) in ends.items()}


def again(texts, folder, **fields):
    """Train on in a folder; what was said."""
    said = []
    outcome = train(quick(texts, **fields), folder, say=said.append)
    return outcome, "\n".join(said)


def assert_same_run(folder, whole):
    assert rows(folder) == rows(whole)
    (arrays, metadata), (expected, expected_metadata) = stored(folder, 40), stored(whole, 40)
    assert metadata == expected_metadata
    assert [name for name in expected if arrays[name] != expected[name]] == []


def test_the_loss_falls_and_every_row_is_there(whole):
    curve = losses(whole)
    assert len(curve) == 40 and curve[-1] < 0.7 * curve[0]
    held_out = [row["held_out_bits_per_byte"] for row in rows(whole) if "held_out_loss" in row]
    assert len(held_out) == 4 and held_out[-1] < held_out[0]
    assert sorted(p.name for p in whole.iterdir()) == [
        "checkpoints",
        "config.json",
        "lock.json",
        "metrics.jsonl",
    ]


def test_the_trained_model_loads_from_the_run_folder(whole):
    arrays, _ = stored(whole, 40)
    for name, array in parameters(store.load(whole)).items():
        assert np.asarray(array).tobytes() == arrays[f"params/{name}"]


def test_a_run_killed_and_resumed_is_the_run_in_one_go(interrupted, texts, whole):
    folder, status, _ = interrupted["killed"]
    assert status == -signal.SIGKILL and rows(folder)[-1]["step"] > 15
    _, said = again(texts, folder)
    assert "from step 15 of 40" in said
    assert_same_run(folder, whole)


def test_a_run_asked_to_stop_saves_exits_0_and_goes_on(interrupted, texts, whole):
    folder, status, output = interrupted["asked"]
    assert status == 0 and "SIGTERM: saved at step 18; run the same command to go on." in output
    assert stored(folder, 18)[1]["step"] == 18
    again(texts, folder)
    assert_same_run(folder, whole)


def test_a_second_signal_ends_at_once_and_the_checkpoint_stays(interrupted, texts, whole):
    folder, status, output = interrupted["pressed"]
    assert status == 143 and "a second signal ends at once" in output
    artifacts.verify(folder / "checkpoints" / "15")
    again(texts, folder)
    assert_same_run(folder, whole)


def test_interrupted_at_any_step_and_often_the_run_is_the_same(texts, whole, tmp_path, monkeypatch):
    place, batches = state.place, iter(range(10_000))
    stops = {0, 11, 12, 39}

    def interrupting(batch, mesh):
        if next(batches) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return place(batch, mesh)

    monkeypatch.setattr(state, "place", interrupting)
    for stop in (1, 12, 13, 40):
        outcome, _ = again(texts, tmp_path / "run", evaluate_every=0)
        assert (outcome.step, outcome.finished) == (stop, stop == 40)
    assert losses(tmp_path / "run") == losses(whole)
    assert stored(tmp_path / "run", 40) == stored(whole, 40)


def test_a_finished_run_trains_nothing_and_says_so(texts, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}
    outcome, said = again(texts, folder, steps=30)
    assert (outcome.step, outcome.finished, outcome.trained) == (40, True, False)
    assert said == f"{folder} is finished at step 40: to train further, give a larger steps=."
    assert {p: p.read_bytes() for p in before} == before


def test_a_finished_run_goes_on_to_a_larger_number_of_steps(texts, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    outcome, said = again(texts, folder, steps=43)
    assert outcome.step == 43 and "from step 40 of 43" in said
    assert losses(folder)[:40] == losses(whole) and len(losses(folder)) == 43
    assert json.loads((folder / "config.json").read_text())["run"]["steps"] == 43


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seed": 3}, r"differs in seed \(was 0, is 3\)"),
        ({"optimizer": Optimizer(lr=1.0)}, r"differs in optimizer.lr \(was 0.003, is 1.0\)"),
        (
            {"model": lm.Config(vocab=257, d_model=32, pattern=(mamba2.Config(),))},
            r"differs in model.pattern.0.mixer \(was \"min_gru\", is \"mamba2\"\)",
        ),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_field(texts, whole, fields, message):
    before = (whole / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=message):
        again(texts, whole, **fields)
    assert (whole / "config.json").read_bytes() == before


def test_a_folder_in_use_or_of_something_else_is_left_alone(texts, whole, tmp_path):
    import fcntl

    folder = shutil.copytree(whole, tmp_path / "run")
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another process"):
            again(texts, folder, steps=50)
    assert json.loads((folder / "config.json").read_text())["run"]["steps"] == 40
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        again(texts, texts)
    with pytest.raises(ConfigError, match="is not a folder"):
        again(texts, texts / "0.txt")


def test_bad_data_leaves_nothing_in_the_way_of_the_next_try(texts, tmp_path):
    data = dataclasses.replace(quick(texts).data, train=quick(tmp_path / "none").data.train)
    with pytest.raises(DataError, match="No file matches"):
        again(texts, tmp_path / "run", data=data)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    outcome, _ = again(texts, tmp_path / "run", steps=1)
    assert outcome.finished


def test_a_run_begins_with_the_weights_of_another_and_goes_on_without_it(texts, whole, tmp_path):
    start, folder = shutil.copytree(whole, tmp_path / "start"), tmp_path / "run"
    again(texts, folder, start=str(start), steps=1, evaluate_every=0)
    assert losses(folder)[0] < 0.8 * losses(whole)[0]
    assert json.loads((folder / "config.json").read_text())["run"]["start"] == str(start)
    other = dataclasses.replace(quick(texts).model, d_model=16)
    with pytest.raises(ConfigError, match=r"start=.*down.weight is \[1, \d+, 32\] and .*, 16\]"):
        again(texts, tmp_path / "other", model=other, start=str(start))
    shutil.rmtree(start)
    assert "step 1 of 2" in again(texts, folder, start=str(start), steps=2, evaluate_every=0)[1]
    with pytest.raises(ConfigError, match="differs in start"):
        again(texts, folder, steps=3)


def test_text_changed_since_the_checkpoint_is_refused(texts, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    kept = (texts / "0.txt").read_bytes()
    (texts / "0.txt").write_text("another text")
    try:
        with pytest.raises(DataError, match="source 'cats' changed"):
            again(texts, folder, steps=41)
    finally:
        (texts / "0.txt").write_bytes(kept)


def test_a_disk_that_is_full_for_one_save_costs_nothing(
    texts, whole, tmp_path, monkeypatch, capsys
):
    write, saves = artifacts.write_manifest, iter(range(100))

    def full(folder):
        if next(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder)

    monkeypatch.setattr(artifacts, "write_manifest", full)
    again(texts, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("failed") == 1 and "Saving step 15" in said and "No space left" in said
    assert_same_run(tmp_path / "run", whole)


def test_a_failing_sink_never_stops_training(texts, whole, tmp_path, monkeypatch, capsys):
    class Broken:
        def log(self, step, row):
            raise ConnectionError("no route to host")

        sync = close = lambda self: (_ for _ in ()).throw(OSError("gone"))

    monkeypatch.setattr(sinks, "TensorBoard", lambda *_: Broken())
    again(texts, tmp_path / "run", track=Track(tensorboard=True))
    assert capsys.readouterr().out.count("Broken failed (ConnectionError") == 1
    assert losses(tmp_path / "run") == losses(whole)


COUNTERS = {"notfinite_count", "last_finite", "total_notfinite"}  # of optax.apply_if_finite


def poisoned(monkeypatch, bad: bytes):
    """Every batch that holds this byte has a loss that is not a number."""
    clean = step.cross_entropy

    def loss(model, batch):
        total = clean(model, batch)
        factor = jnp.where(jnp.any(batch.tokens == bad[0]), jnp.nan, 1.0)
        return total._replace(nats=total.nats * factor)

    gradient = step.make_gradient
    monkeypatch.setattr(step, "make_gradient", lambda model, _: gradient(model, loss))


def test_steps_that_are_not_finite_are_skipped_and_counted(texts, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, b"7")
    outcome, _ = again(texts, tmp_path / "run", evaluate_every=0)
    bad = [row["step"] for row in rows(tmp_path / "run") if row.get("loss", 0) is None]
    assert 0 < len(bad) < 40
    assert capsys.readouterr().out.count("the update was skipped") == len(bad)
    for array in parameters(outcome.model).values():
        assert np.isfinite(array).all()


def test_too_many_bad_steps_in_a_row_end_the_run_with_nothing_applied(texts, tmp_path, monkeypatch):
    poisoned(monkeypatch, b"7")
    folder, end = tmp_path / "run", "not finite for 3 steps up to step 4: start another run"
    fields = {"evaluate_every": 0, "max_bad_steps": 3, "checkpoint": Checkpoint(every=1, keep=9)}
    with pytest.raises(NumericalError, match=end) as caught:
        again(texts, folder, **fields)
    assert caught.value.code == 77
    assert [row["loss"] is None for row in rows(folder)] == [False, True, True, True]
    (first, _), (last, metadata) = stored(folder, 1), stored(folder, 3)
    assert metadata["position"] == {"cats": 12}
    changed = [name for name in first if first[name] != last[name]]
    assert changed and all(n.rsplit("/")[-1] in COUNTERS for n in changed), changed
    with pytest.raises(NumericalError, match="not finite for 3 steps up to step 4"):
        again(texts, folder, **fields)  # the count goes on where it was


def test_parts_of_a_batch_add_up_to_the_batch(texts, whole, tmp_path):
    again(texts, tmp_path / "run", accumulate=2, steps=10, evaluate_every=0)
    assert_close(np.float32(losses(tmp_path / "run")), np.float32(losses(whole)[:10]), GRADIENT)


def test_a_mesh_trains_as_one_device_does_and_resumes_on_another(texts, whole, tmp_path):
    folder = tmp_path / "run"
    again(texts, folder, mesh=Mesh(data=2, seq=2, model=2), steps=6, evaluate_every=0)
    saved = stored(folder, 6)
    again(texts, folder, steps=12, evaluate_every=0)
    assert_close(np.float32(losses(folder)), np.float32(losses(whole)[:12]), GRADIENT)
    outcome, said = again(texts, folder, mesh=Mesh(data=4), steps=12)
    assert "finished at step 12" in said
    arrays = stored(folder, 12)[0]
    spread = parameters(outcome.model)
    assert max(len(a.sharding.device_set) for a in spread.values()) == 4
    for name, array in spread.items():
        assert np.asarray(array).tobytes() == arrays[f"params/{name}"]
    assert saved[1]["step"] == 6


def test_documents_in_turns_train_as_one_device_does_and_log_the_gain(texts, whole, tmp_path):
    mesh = Mesh(seq=2, groups=True)
    again(texts, tmp_path / "run", mesh=mesh, steps=4, evaluate_every=0)
    assert_close(np.float32(losses(tmp_path / "run")), np.float32(losses(whole)[:4]), GRADIENT)
    logged = [row["predicted_speedup"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(logged) == 4 and min(logged) >= 1


def test_a_window_too_short_for_a_document_is_refused_where_the_batch_is_placed(texts, tmp_path):
    window = Mesh(seq=4, strategy="window", hops=1)
    with pytest.raises(DataError, match="A document begins 3 devices before its end but mesh.hops"):
        train(quick(texts, mesh=window), tmp_path / "run", say=lambda text: None)
    ids = np.repeat([[1, 1, 1, 2, 2, 2, 2, 3, 3]], 2, axis=0)  # eight, and what the last predicts
    batch = Batch(ids, ids)
    with use_mesh(seq=4, strategy="window", hops=2) as mesh:
        state.place(batch, mesh)
    refused = pytest.raises(DataError, match="begins 2 devices .* mesh.hops = 1: .*mesh.hops=2")
    with use_mesh(seq=4, strategy="window", hops=1) as mesh, refused:
        state.place(batch, mesh)


def test_a_run_keeps_its_tokenizer(texts, tmp_path):
    (tmp_path / "bpe").mkdir()
    spec = str(write_tokenizer(tmp_path / "bpe") / "tokenizer.json")
    config = quick(texts, steps=2)
    config = settings.override(config, [f"data.tokenizer={spec}", "model.vocab=290"])
    outcome = train(config, tmp_path / "run", say=lambda text: None)
    shutil.rmtree(tmp_path / "bpe")
    kept = store.load_tokenizer(tmp_path / "run")
    assert kept.fingerprint == outcome.tokenizer.fingerprint
    assert kept.decode(kept.encode("the cat")) == "the cat"
    assert store.load(tmp_path / "run").config.vocab == 290


def test_a_run_that_lost_its_checkpoints_starts_anew_and_says_so(texts, whole, tmp_path):
    folder, said = shutil.copytree(whole, tmp_path / "run"), []
    shutil.rmtree(folder / "checkpoints")
    train(quick(texts, steps=2), folder, say=said.append)
    assert "holds no checkpoint: starting at step 1" in said[0]
    assert (folder / "metrics.jsonl.old").read_text() == (whole / "metrics.jsonl").read_text()
    assert losses(folder) == losses(whole)[:2]


def test_a_run_whose_last_step_is_not_saved_does_not_end_well(texts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifacts, "publish", full)
    with pytest.raises(CheckpointError, match="Step 2, the last, is not saved"):
        train(quick(texts, steps=2), tmp_path / "run", say=lambda text: None)
