"""Many processes are one program: the same loss, one run folder, and an end that is told."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.parallel import local
from seqlab.train import loop
from seqlab.train.config import load
from tests.runs import losses, rows, stored, write_texts

ENVIRONMENT = {
    **os.environ,
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # many small programs, in every process
}

CONFIG = """
import pathlib
from tests.runs import tiny
from seqlab.layers.mixers import min_gru
from seqlab.models import lm
from seqlab.train.config import Checkpoint
model = lm.Config(vocab=257, d_model=16, pattern=(min_gru.Config(),), ffn=None)
fields = dict(model=model, steps=8, evaluate_every=0, checkpoint=Checkpoint(every=2, keep=9))
config = tiny(pathlib.Path({texts!r}), **fields)
"""

#: The command line, with a fault in one process when it places the batch of a step.
FAULTY = """
import os, signal, sys, time
from seqlab.cli import main
from seqlab.errors import DataError
from seqlab.train import state
victim, at, fault = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
place, batches = state.place, iter(range(1, 10_000))
def faulty(batch, mesh):
    import jax
    if next(batches) == at and jax.process_index() == victim:
        if fault == "sleep":
            time.sleep(600)
        elif fault == "raise":
            raise DataError("The disk is gone.")
        else:
            os.kill(os.getpid(), getattr(signal, fault))
    return place(batch, mesh)
state.place = faulty
main()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    texts = write_texts(folder / "texts")
    (folder / "run.py").write_text(CONFIG.format(texts=str(texts)))
    return folder


@pytest.fixture(scope="module")
def config(base):
    return load(base / "run.py")


def start(base, out, *more, processes=2, fault=("0", "0", "none"), each=None):
    """Exit codes and outputs of several processes that train `run.py` together."""
    port = local.free_port()
    place = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", FAULTY, *fault, "train", str(base / "run.py")]
            + ["--out", str(out), *place, "--process-id", str(index), *more]
            + (each[index] if each else []),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]
    outputs = [child.communicate(timeout=180)[0] for child in children]
    return [child.returncode for child in children], outputs


@pytest.fixture(scope="module")
def one(base, config):
    """The run in one process."""
    loop.train(config, base / "one", say=lambda text: None)
    return base / "one"


@pytest.fixture(scope="module")
def two(base):
    """The run in two processes, by the launcher for trials."""
    command = [sys.executable, "-m", "seqlab.parallel.local", "2", "--", "train"]
    command += [str(base / "run.py"), "--out", str(base / "two")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The report is in" in done.stdout
    assert all("step " not in line for line in done.stdout.splitlines() if line[:3] == "[1]")
    return base / "two"


def same_curve(folder, other, steps=8):
    ours, theirs = losses(folder), losses(other)
    assert len(ours) == steps
    assert_close(np.float32(ours), np.float32(theirs[:steps]), GRADIENT)


def test_two_processes_have_the_loss_of_one(one, two):
    same_curve(two, one)
    assert not (two / "processes").exists() and (two / "report.html").exists()


def test_a_checkpoint_of_two_processes_is_restored_in_one(base, config, one, two):
    folder = shutil.copytree(two, base / "two_then_one")
    for step in ("6", "8"):
        shutil.rmtree(folder / "checkpoints" / step)
    said = []
    loop.train(config, folder, say=said.append)
    assert "from step 4 of 8" in said[0]
    same_curve(folder, one)
    assert stored(folder, 4) == stored(two, 4)


def test_a_silent_process_is_named_with_its_stack(base, one):
    """In a run that goes on from a checkpoint of one process, in two that share every row."""
    folder = shutil.copytree(one, base / "stalled")
    for step in ("6", "8"):
        shutil.rmtree(folder / "checkpoints" / step)
    codes, outputs = start(base, folder, "mesh.seq=2", "--stall", "6", fault=("1", "4", "sleep"))
    assert codes == [75, 75]
    assert "from step 4 of 8" in outputs[0]
    same_curve(folder, one, steps=7)
    for output in outputs:
        assert "silent: process 1 (pid" in output and "reading the batch of step 8" in output
    assert "in faulty" in outputs[1] and "in faulty" not in outputs[0]


def test_a_killed_process_ends_the_other_and_the_run_resumes_exactly(base, two):
    folder = base / "killed"
    codes, outputs = start(base, folder, "--heartbeat", "6", fault=("1", "6", "SIGKILL"))
    assert codes == [76, 137]
    assert "process 1 (pid" in outputs[0] and "is gone: nothing was heard of it" in outputs[0]
    assert "run the same command on every machine" in outputs[0]
    codes, outputs = start(base, folder, fault=("1", "1", "SIGTERM"))
    assert codes == [0, 0]
    step = 6 if "from step 4 of 8" in outputs[0] else 4  # was the save of step 4 under way?
    assert f"SIGTERM: saved at step {step};" in outputs[0]  # a vote is known a step later
    assert rows(folder) == rows(two)[:step]
    assert stored(folder, step) == stored(two, step)


def test_the_first_process_killed_ends_the_others_too(base):
    codes, outputs = start(base, base / "headless", fault=("0", "1", "SIGKILL"))
    assert codes == [137, 76] and "is gone" in outputs[1]


def test_an_error_of_one_process_is_told_by_all(base):
    codes, outputs = start(base, base / "raised", fault=("1", "1", "raise"))
    assert codes == [76, 2]
    assert "process 1 (pid" in outputs[0] and "The disk is gone." in outputs[0]
    assert outputs[1].strip().endswith("seqlab: The disk is gone.")


def test_processes_of_different_runs_are_refused_by_field(base):
    codes, outputs = start(base, base / "different", each=[["seed=1"], ["seed=2"]])
    assert codes == [2, 2]
    for output in outputs:
        assert "seed is 1 in process 0 and 2 in process 1" in output
    assert not (base / "different").exists()
