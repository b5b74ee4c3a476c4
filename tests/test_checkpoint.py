"""Checkpoints are whole or absent: damage, crashes and full disks never cost more than one step."""

import errno
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab.errors import CheckpointError, ConfigError
from seqlab.models import artifacts
from seqlab.parallel.mesh import make_mesh
from seqlab.train import checkpoint
from seqlab.train.checkpoint import Checkpoints, RunLock

METADATA = {"position": {"a": 3}, "tokens": 7}


def arrays(step: int) -> dict[str, jax.Array]:
    """Every kind of array that a state may hold, different at each step."""
    key = jax.random.key(step)
    bits = jax.random.bits(key, (3, 5), jnp.uint32)
    return {
        "params/float": jax.random.normal(key, (16, 8)),
        "params/blocks.0.half": jax.random.normal(key, (4, 3), jnp.bfloat16),
        "optimizer/0/count": jnp.int32(step),
        "optimizer/key": bits,
        "optimizer/mask": bits % 2 == 0,
    }


def like(arrays, sharding=None):
    here = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for n, a in arrays.items()}


LIKE = like(arrays(0))


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        got = actual[name]
        assert (got.dtype, got.shape) == (array.dtype, array.shape), name
        assert np.asarray(got).tobytes() == np.asarray(array).tobytes(), name


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, arrays(step), {**METADATA, "step": step})
    checkpoints.wait()


def restored(folder: pathlib.Path) -> tuple[checkpoint.Restored | None, list[str]]:
    """The newest good step, and what the user is told."""
    said = []
    checkpoints = Checkpoints(folder, on_warning=said.append)
    try:
        return checkpoints.latest(LIKE), said
    finally:
        checkpoints.close()


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", on_warning=pytest.fail)
    yield checkpoints
    checkpoints.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "two"
    checkpoints = Checkpoints(folder)
    save(checkpoints, 3, 5)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(two_steps, tmp_path):
    """Steps 3 and 5, both good."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def files(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_what_is_restored_is_what_was_saved_bit_for_bit(folder):
    found, said = restored(folder)
    assert (found.step, found.metadata, said) == (5, {**METADATA, "step": 5}, [])
    assert_same(found.arrays, arrays(5))


def test_arrays_may_be_donated_as_soon_as_save_returns(checkpoints):
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    large = jnp.arange(2**20, dtype=jnp.float32)
    expected = {"params/large": np.asarray(large).copy()}
    checkpoints.save(1, {"params/large": large}, {})
    for _ in range(20):
        large = add(large)
    checkpoints.wait()
    found = checkpoints.latest(like(expected))
    assert_same(found.arrays, expected)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_steps_are_kept(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    save(checkpoints, 2, 9, 10, 11)
    checkpoints.close()
    assert checkpoints.steps() == [2, 9, 10, 11][-keep:]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, checkpoints.steps()))


def test_every_flipped_bit_is_noticed(folder):
    chance = random.Random(0)
    flips = 0
    for path in files(folder / "5"):
        good = path.read_bytes()
        offsets = (
            {0, len(good) - 1, *(chance.randrange(len(good)) for _ in range(24))} if good else ()
        )
        for offset in offsets:
            bad = bytearray(good)
            bad[offset] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(CheckpointError):
                artifacts.verify(folder / "5")
            flips += 1
        path.write_bytes(good)
    artifacts.verify(folder / "5")
    assert flips > 300


DAMAGE = {
    "flipped": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    ),
    "cut to nothing": lambda path: path.write_bytes(b""),
    "cut by half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_damage_the_step_before_is_used_with_one_warning(folder, damage):
    """Every file in turn is known to `verify`; the way back to step 3 is walked for a few."""
    paths = [path for path in files(folder / "5") if path.stat().st_size]
    for path in paths:
        good = path.read_bytes()
        DAMAGE[damage](path)
        with pytest.raises(CheckpointError):
            artifacts.verify(folder / "5")
        path.write_bytes(good)
    named = [p for p in paths if p.name in ("manifest.json", "contents.json", "_METADATA")][:3]
    for path in [*named, max(paths, key=lambda p: p.stat().st_size)]:
        spare = shutil.copytree(folder, folder.with_name("spare"))
        DAMAGE[damage](spare / path.relative_to(folder))
        found, said = restored(spare)
        assert found.step == 3 and len(said) == 1 and "5.damaged" in said[0]
        assert_same(found.arrays, arrays(3))
        assert sorted(p.name for p in spare.iterdir()) == ["3", "5.damaged"]
        shutil.rmtree(spare)


def test_junk_is_never_taken_for_the_newest_step(folder):
    for name in ("7.tmp", "saving-9", "notes", "-8", "007", "٩", "1e3", "5.damaged"):
        (folder / name).mkdir()
    (folder / "8").write_text("a file")
    found, said = restored(folder)
    assert (found.step, said) == (5, [])
    (folder / "99").mkdir()
    found, said = restored(folder)
    assert found.step == 5 and len(said) == 1 and "99.damaged" in said[0]


def test_what_an_interrupted_save_left_is_removed_by_the_next_save(folder):
    (folder / "saving-4" / "arrays").mkdir(parents=True)
    checkpoints = Checkpoints(folder)
    save(checkpoints, 6)
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["5", "6"]


def test_a_step_damaged_twice_keeps_both_remains(folder):
    for remains in (["5.damaged"], ["5.damaged", "5.damaged2"]):
        (folder / "5" / "manifest.json").unlink()
        assert restored(folder)[0].step == 3
        assert sorted(p.name for p in folder.glob("*.damaged*")) == remains
        checkpoints = Checkpoints(folder)
        save(checkpoints, 5)
        checkpoints.close()


def test_when_all_steps_are_damaged_nothing_begins_anew(folder):
    for step in ("3", "5"):
        files(folder / step)[0].write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="Every checkpoint in .* is damaged"):
            restored(folder)


def test_a_folder_without_steps_is_a_fresh_start(tmp_path):
    assert restored(tmp_path / "none") == (None, [])
    (tmp_path / "saving-3").mkdir()
    assert restored(tmp_path) == (None, [])


def test_a_possible_pickle_is_never_read(folder):
    (folder / "5" / "weights.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    found, said = restored(folder)
    assert found.step == 3 and "unpickling runs code" in said[0]
    (folder / "3" / "arrays" / "link").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="damaged"):
        restored(folder)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# writes that were under way call back into a loop that the library has closed after the first error
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["at the start", "while hashing", "while writing"])
def test_a_full_disk_costs_one_save_and_is_told_once(folder, monkeypatch, caplog, where):
    said = []
    checkpoints = Checkpoints(folder, on_warning=said.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if where == "at the start":
            patch.setattr(checkpoints._checkpointer, "save", full)
        elif where == "while hashing":
            patch.setattr(artifacts, "write_manifest", full)
        else:  # the writing library itself meets the limit, in its own threads
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            save(checkpoints, 6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    why = "File too large" if where == "while writing" else "No space left on device"
    assert len(said) == 1 and f"failed ({why}); earlier checkpoints are intact" in said[0]
    assert not caplog.records  # the library's own tracebacks
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5"]
    assert_same(checkpoints.latest(LIKE).arrays, arrays(5))
    save(checkpoints, 7)  # there is space again
    checkpoints.close()
    assert len(said) == 1 and restored(folder)[0].step == 7


def test_a_failed_save_stops_the_run_if_asked_to(folder, monkeypatch):
    checkpoints = Checkpoints(folder, on_failure="stop", on_warning=pytest.fail)
    monkeypatch.setattr(artifacts, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"No space left.*free space"):
        save(checkpoints, 6)
    monkeypatch.setattr(checkpoints._checkpointer, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(7, arrays(7), {})
    checkpoints.close()
    assert restored(folder)[0].step == 5


SAVES_FOR_EVER = """
import sys
from tests.test_checkpoint import Checkpoints, arrays
checkpoints = Checkpoints(sys.argv[1])
for step in range(10_000):
    checkpoints.save(step, arrays(step), {})
    print(step, flush=True)
"""


def test_kill_9_while_saving_leaves_a_good_step(tmp_path):
    def run(folder):
        program = [sys.executable, "-c", SAVES_FOR_EVER, str(folder)]
        return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)

    folders = [tmp_path / str(i) for i in range(3)]
    processes = [run(folder) for folder in folders]
    for folder, process, begun in zip(folders, processes, (3, 5, 8), strict=True):
        while int(process.stdout.readline()) < begun:
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found, said = restored(folder)
        assert found.step >= begun - 1 and not said
        assert_same(found.arrays, arrays(found.step))


MISMATCHES = {
    "missing": (
        lambda like: like.pop("params/float"),
        r"params/float: float32\[16, 8\], not absent",
    ),
    "extra": (
        lambda like: like.update({"params/new": like["params/float"]}),
        r"params/new: absent, not float32",
    ),
    "shape": (
        lambda like: like.update({"params/float": LIKE["params/blocks.0.half"]}),
        r"params/float: float32\[16, 8\], not bfloat16\[4, 3\]",
    ),
    "dtype": (
        lambda like: like.update({"optimizer/mask": LIKE["optimizer/key"]}),
        r"optimizer/mask: bool\[3, 5\], not uint32\[3, 5\]",
    ),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_arrays_of_another_model_are_named_and_not_set_aside(folder, kind):
    change, message = MISMATCHES[kind]
    wanted = dict(LIKE)
    change(wanted)
    checkpoints = Checkpoints(folder, on_warning=pytest.fail)
    with pytest.raises(CheckpointError, match=f"holds another model: 1 arrays differ.*{message}"):
        checkpoints.latest(wanted)
    checkpoints.close()
    assert checkpoints.steps() == [3, 5]


def test_a_step_moves_between_meshes_without_a_changed_bit(tmp_path):
    layouts = [({"data": 8}, P("data")), ({}, P()), ({"data": 2, "model": 2}, P("data", "model"))]
    expected = {"params/a": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
    kept = expected
    for step, (axes, spec) in enumerate(layouts):
        place = NamedSharding(make_mesh(**axes), spec)
        checkpoints = Checkpoints(tmp_path)
        if step:
            kept = checkpoints.latest(like(expected, place)).arrays
            assert kept["params/a"].sharding == place
            assert_same(kept, expected)
        kept = jax.device_put(kept, place)
        checkpoints.save(step, kept, {})
        checkpoints.close()


HOLDS_THE_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 17 on elsewhere", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path):
    lock = tmp_path / checkpoint.LOCK
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    with pytest.raises(ConfigError, match="in use by process 17 on elsewhere"), RunLock(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    assert lock.exists()
    with RunLock(tmp_path):
        assert f"process {os.getpid()} on" in lock.read_text()
        with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path):
            pass
    assert not lock.exists()


def test_the_manifest_is_plain_json_that_names_every_file(folder):
    named = json.loads((folder / "5" / "manifest.json").read_text())["files"]
    there = {p.relative_to(folder / "5").as_posix() for p in files(folder / "5")}
    assert set(named) == there - {"manifest.json"}
