"""Processes that die while they save, and processes that meet in one folder."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from seqlab.errors import ConfigError
from seqlab.train.lock import RunLock
from tests.test_checkpoint import arrays_of, bits, restore

ROOT = pathlib.Path(__file__).parent.parent

SAVE_FOR_EVER = """
import sys
from tests.test_checkpoint import Checkpoints, arrays_of, like
checkpoints = Checkpoints(sys.argv[1], on_warning=lambda text: sys.exit(text))
restored = checkpoints.latest(like(arrays_of(0)))
step = restored.step if restored else 0
while True:
    step += 1
    checkpoints.save(step, arrays_of(step), {"step": step})
    print(step, flush=True)
"""


def test_a_run_killed_while_saving_resumes_exactly(tmp_path):
    draw, reached = np.random.default_rng(), 0
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    for _ in range(3):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            started = [int(child.stdout.readline()) for _ in range(int(draw.integers(3, 9)))]
            child.kill()
        assert started[0] > reached
        partial = list(tmp_path.glob("saving-*"))
        assert len(partial) <= 1 and len(list(tmp_path.iterdir())) <= 3 + len(partial)
        warnings = []
        restored = restore(tmp_path, warnings)
        assert not warnings and restored.step >= started[-1] - 1
        assert bits(restored.arrays) == bits(arrays_of(restored.step))
        reached = restored.step


HOLD = """
import sys
from seqlab.train.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as child:
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"in use by process {child.pid} on"),
            RunLock(tmp_path),
        ):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        with RunLock(tmp_path), pytest.raises(ConfigError, match=f"by process {os.getpid()}"):
            RunLock(tmp_path).__enter__()  # taken over from the dead, and held
    with RunLock(tmp_path):
        pass
    assert json.loads((tmp_path / "lock.json").read_text()) == {}


LAUNCHER = """
import os, signal, subprocess
from seqlab.parallel.local import end_with_parent
child = subprocess.Popen(["sleep", "600"], preexec_fn=end_with_parent, start_new_session=True)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_killed_launcher_leaves_no_process_behind():
    command = [sys.executable, "-c", LAUNCHER]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output, _ = launcher.communicate(timeout=60)  # ends when the child, too, has closed it
    assert launcher.returncode == -signal.SIGKILL
    for _ in range(200):  # a process closes its files a moment before it is gone
        if not _lives(output.strip()):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {output.strip()} outlives its launcher")


def _lives(process: str) -> bool:
    try:
        status = pathlib.Path("/proc", process, "status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status
