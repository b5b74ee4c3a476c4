"""Checkpoints are whole or absent: damage of any kind is seen, told once, and stepped over."""

import errno
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from seqlab.errors import CheckpointError
from seqlab.models import artifacts
from seqlab.train import checkpoint
from seqlab.train.checkpoint import Checkpoints


def arrays_of(step: int) -> dict[str, jax.Array]:
    """What a run might hold at a step, each number a function of the step."""
    draw = np.random.default_rng(step)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)
    return {
        "params/blocks.0.mixer.qkv.weight": normal(2, 8, 16),
        "params/blocks.0.mixer.qkv/weight": normal(3),  # no two names may meet on disk
        "params/head": normal(8, 4).astype(jnp.bfloat16),
        "optimizer/inner_state/0/mu/blocks.0.mixer.qkv.weight": normal(2, 8, 16),
        "optimizer/inner_state/0/count": jnp.int32(step),
        "optimizer/finite": jnp.asarray(step % 2 == 0),
        "rng": jax.random.key_data(jax.random.key(step)),
    }


def like(arrays, place=None):
    place = place or (lambda name: SingleDeviceSharding(jax.devices()[0]))
    return {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(name))
        for name, a in arrays.items()
    }


def bits(arrays) -> dict[str, tuple]:
    return {n: (str(a.dtype), a.shape, np.asarray(a).tobytes()) for n, a in arrays.items()}


def save_steps(folder, *steps, **options) -> None:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, arrays_of(step), {"step": step})
    checkpoints.close()


def restore(folder, warnings: list):
    checkpoints = Checkpoints(folder, on_warning=warnings.append)
    try:
        return checkpoints.latest(like(arrays_of(0)))
    finally:
        checkpoints.close()


def files_of(folder: pathlib.Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pristine")
    save_steps(folder, 10, 20)
    return folder


@pytest.fixture
def run(two_steps, tmp_path) -> pathlib.Path:
    """A copy of good checkpoints 10 and 20, to be damaged."""
    shutil.copytree(two_steps, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def check_falls_back(folder: pathlib.Path, says: str = "") -> None:
    """Step 20 is set aside with one warning, step 10 comes back exactly."""
    warnings = []
    restored = restore(folder, warnings)
    assert restored.step == 10
    assert bits(restored.arrays) == bits(arrays_of(10))
    assert len(warnings) == 1 and "20.damaged" in warnings[0] and says in warnings[0]
    assert "\n" not in warnings[0]
    assert sorted(p.name for p in folder.iterdir() if "20" in p.name) == ["20.damaged"]


def test_what_was_saved_comes_back_to_the_bit(two_steps):
    warnings = []
    restored = restore(two_steps, warnings)
    assert (restored.step, restored.metadata, warnings) == (20, {"step": 20}, [])
    assert bits(restored.arrays) == bits(arrays_of(20))


def test_nothing_saved_yet_is_none(tmp_path):
    assert restore(tmp_path / "never", []) is None
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine")
    assert restore(tmp_path, []) is None
    assert (tmp_path / "notes" / "x.txt").exists()


def test_the_newest_keep_stay(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_the_same_step_is_not_saved_twice(two_steps, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, arrays_of(5), {})
    checkpoints.save(5, arrays_of(6), {})
    restored = checkpoints.latest(like(arrays_of(5)))
    checkpoints.close()
    assert bits(restored.arrays) == bits(arrays_of(5))


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda a: jax.tree.map(lambda x: x * 0, a), donate_argnums=0)
    big = {"params/w": jnp.asarray(np.random.default_rng(0).standard_normal((512, 1024)))}
    before = bits(big)
    checkpoints = Checkpoints(tmp_path)
    for step in range(3):
        checkpoints.save(step, big, {})
        jax.block_until_ready(overwrite(big))
        assert big["params/w"].is_deleted()  # nobody but the step held on to the buffer
        restored = checkpoints.latest(like({"params/w": jnp.zeros((512, 1024))}))
        assert (restored.step, bits(restored.arrays)) == (step, before)
        big = restored.arrays
    checkpoints.close()


def test_metadata_must_be_strict_json(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        checkpoints.save(1, arrays_of(1), {"loss": float("nan")})
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, arrays_of(1), {"loss": np.float32(1)})
    checkpoints.close()
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_seen(run):
    draw, step = np.random.default_rng(0), run / "20"
    for name in files_of(step):
        good = (step / name).read_bytes()
        for offset in draw.integers(len(good), size=6):
            bad = bytearray(good)
            bad[offset] ^= 1 << int(draw.integers(8))
            (step / name).write_bytes(bad)
            with pytest.raises(CheckpointError):
                artifacts.verify(step)
        (step / name).write_bytes(good)
    artifacts.verify(step)


def test_every_bit_of_a_manifest_counts(run):
    path = run / "20" / artifacts.MANIFEST
    good = path.read_bytes()
    for place in range(0, 8 * len(good), 331):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            artifacts.verify(run / "20")


def test_every_file_cut_short_is_seen(run):
    step = run / "20"
    for name in files_of(step):
        good = (step / name).read_bytes()
        for length in {0, 1, len(good) // 2, len(good) - 1}:
            (step / name).write_bytes(good[:length])
            with pytest.raises(CheckpointError):
                artifacts.verify(step)
        (step / name).write_bytes(good)


def test_every_missing_file_is_seen(run):
    step = run / "20"
    for name in files_of(step):
        (step / name).rename(run / "away")
        with pytest.raises(CheckpointError, match="is missing: restore|no readable"):
            artifacts.verify(step)
        (run / "away").rename(step / name)


def test_a_flipped_bit_in_the_weights_falls_back(run):
    arrays = [p for p in (run / "20" / "arrays").rglob("*") if p.is_file()]
    largest = max(arrays, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    check_falls_back(run, "not as it was written")


def test_a_step_cut_short_falls_back(run):
    path = run / "20" / "contents.json"
    path.write_bytes(path.read_bytes()[:-1])
    check_falls_back(run, "contents.json has")


def test_a_step_without_its_manifest_falls_back(run):
    (run / "20" / artifacts.MANIFEST).unlink()
    check_falls_back(run, "manifest.json")


def test_a_step_with_a_pickle_in_it_falls_back(run):
    (run / "20" / "extra.PKL").write_bytes(b"cos\nsystem\n")
    check_falls_back(run, "may be a pickle")


def test_a_step_with_a_file_of_another_falls_back(run):
    (run / "20" / "extra.txt").write_text("hello")
    check_falls_back(run, "not in the manifest")


def test_a_step_with_a_link_out_of_it_falls_back(run):
    path = run / "20" / "contents.json"
    path.rename(run / "elsewhere.json")
    path.symlink_to(run / "elsewhere.json")
    check_falls_back(run, "is a link")


def test_an_empty_folder_of_a_later_step_is_never_the_newest(run):
    (run / "99").mkdir()
    warnings = []
    assert restore(run, warnings).step == 20
    assert len(warnings) == 1 and (run / "99.damaged").is_dir()


def test_names_that_are_no_steps_are_left_alone(run):
    for name in ("040", "²", "best", "20.old"):
        (run / name).mkdir()
    (run / "30").write_text("a file")
    warnings = []
    assert restore(run, warnings).step == 20
    assert not warnings
    assert all((run / name).exists() for name in ("040", "²", "best", "20.old", "30"))


def test_a_second_damaged_folder_of_one_step_gets_a_number(run):
    (run / "20.damaged").mkdir()
    (run / "20" / artifacts.MANIFEST).unlink()
    restore(run, [])
    assert (run / "20.damaged2" / "contents.json").exists()


def test_all_damaged_is_an_error_every_time(run):
    for step in ("10", "20"):
        (run / step / artifacts.MANIFEST).unlink()
    for _ in range(2):  # the second time only set-aside folders are there
        with pytest.raises(CheckpointError, match="Every checkpoint in .* is damaged: restore"):
            restore(run, [])


def test_a_set_aside_step_can_be_saved_again(run):
    (run / "20" / artifacts.MANIFEST).unlink()
    checkpoints = Checkpoints(run, on_warning=lambda text: None)
    assert checkpoints.latest(like(arrays_of(0))).step == 10
    checkpoints.save(20, arrays_of(20), {})
    assert bits(checkpoints.latest(like(arrays_of(0))).arrays) == bits(arrays_of(20))
    checkpoints.close()


def test_what_a_crash_left_is_removed_at_the_next_start(run):
    (run / "saving-30" / "arrays").mkdir(parents=True)
    assert restore(run, []).step == 20
    assert sorted(p.name for p in run.iterdir()) == ["10", "20"]


def change(**changes):
    arrays = {**arrays_of(0), **changes}
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"params/head": None}, r"params/head: bfloat16\[8, 4\], not absent"),
        ({"params/new": jnp.zeros(3)}, r"params/new: absent, not float32\[3\]"),
        (
            {"params/head": jnp.zeros((4, 8), jnp.bfloat16)},
            r"bfloat16\[8, 4\], not bfloat16\[4, 8\]",
        ),
        ({"params/head": jnp.zeros((8, 4))}, r"params/head: bfloat16\[8, 4\], not float32\[8, 4\]"),
        ({"rng": None}, r"1 arrays differ \(rng: uint32\[2\], not absent\)"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "group"],
)
def test_arrays_of_another_model_are_refused_by_name(run, asked, says):
    checkpoints = Checkpoints(run)
    with pytest.raises(CheckpointError, match=f"of another model: .*{says}"):
        checkpoints.latest(like(change(**asked)))
    checkpoints.close()
    assert (run / "20").is_dir()  # the checkpoint is good


def test_arrays_come_back_on_another_mesh(tmp_path):
    def placed(*shape):
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        return lambda name: NamedSharding(
            mesh, P(None, "data", "model") if name.endswith("qkv.weight") else P()
        )

    arrays = arrays_of(3)
    place = placed(2, 4)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {n: jax.device_put(a, place(n)) for n, a in arrays.items()}, {})
    for shape in ((8, 1), (1, 2), (1, 1)):
        wanted = like(arrays, placed(*shape))
        restored = checkpoints.latest(wanted).arrays
        assert bits(restored) == bits(arrays)
        assert all(restored[n].sharding == wanted[n].sharding for n in arrays)
    checkpoints.close()


@pytest.fixture
def small_files():
    """No file may grow beyond 64 kB: a write of more fails as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_warns_and_training_goes_on(run, small_files, caplog):
    warnings = []
    checkpoints = Checkpoints(run, on_warning=warnings.append)
    draw = np.random.default_rng(0).standard_normal(50_000)
    checkpoints.save(30, {"params/w": jnp.asarray(draw)}, {})
    checkpoints.wait()
    assert len(warnings) == 1 and "Saving step 30" in warnings[0] and "too large" in warnings[0]
    assert "\n" not in warnings[0] and "Traceback" not in caplog.text
    assert sorted(p.name for p in run.iterdir()) == ["10", "20"]
    checkpoints.save(31, arrays_of(31), {"step": 31})
    restored = checkpoints.latest(like(arrays_of(0)))
    checkpoints.close()
    assert restored.step == 31 and len(warnings) == 1


# writes that were under way call back into a loop that orbax has closed after the first error
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_full_to_the_last_byte_costs_one_save(run, small_files):
    warnings = []
    checkpoints = Checkpoints(run, on_warning=warnings.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    checkpoints.save(30, {"params/w": jnp.zeros(3)}, {})  # all of orbax's own files fail
    checkpoints.wait()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    checkpoints.save(31, arrays_of(31), {})
    restored = checkpoints.latest(like(arrays_of(0)))
    checkpoints.close()
    assert restored.step == 31 and len(warnings) == 1 and "File too large" in warnings[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EPERM])
def test_a_failure_while_publishing_leaves_earlier_steps(run, monkeypatch, code):
    def fail(folder, name):
        raise OSError(code, os.strerror(code))

    warnings = []
    monkeypatch.setattr(checkpoint.artifacts, "publish", fail)
    checkpoints = Checkpoints(run, keep=1, on_warning=warnings.append)
    checkpoints.save(30, arrays_of(30), {})
    checkpoints.close()
    assert len(warnings) == 1 and os.strerror(code) in warnings[0]
    assert sorted(p.name for p in run.iterdir()) == ["10", "20"]


def test_a_failed_save_stops_the_run_where_that_is_asked(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints = Checkpoints(tmp_path / "checkpoints", on_failure="stop")
    with pytest.raises(CheckpointError, match="Saving step 1 in .* failed .*: free space or mend"):
        checkpoints.save(1, arrays_of(1), {})
        checkpoints.wait()
    checkpoints.close()
