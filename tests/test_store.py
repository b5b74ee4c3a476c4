"""Saved models: written whole, read back to the bit, refused in a sentence when they are not."""

import json
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from flax import nnx

from seqlab import settings
from seqlab.errors import CheckpointError, ConfigError, ModelError, SeqlabError
from seqlab.layers.mixers import gla
from seqlab.models import artifacts, lm, store
from seqlab.models.parameters import bind, parameters
from seqlab.models.tokenizer import ByteTokenizer
from seqlab.train.checkpoint import Checkpoints

SMALL = lm.Config(vocab=257, d_model=16, pattern=(gla.Config(),), repeats=2, dtype="float32")


@pytest.fixture(scope="module")
def model() -> lm.LM:
    return SMALL.build(rngs=nnx.Rngs(0))


@pytest.fixture
def saved(model, tmp_path) -> pathlib.Path:
    return store.save(model, tmp_path / "model")


def bits(model) -> dict[str, tuple]:
    arrays = parameters(model)
    return {n: (str(a.dtype), a.shape, np.asarray(a).tobytes()) for n, a in arrays.items()}


def rewrite(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def run(model, tmp_path) -> pathlib.Path:
    """A run folder with checkpoints 1, of zeros, and 2, of `model`."""
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder / "checkpoints")
    zeros = bind(model, {name: jnp.zeros_like(a) for name, a in parameters(model).items()})
    for step, held in enumerate((zeros, model), start=1):
        arrays = {f"params/{name}": a for name, a in parameters(held).items()}
        arrays["optimizer/count"] = jnp.int32(step)
        checkpoints.save(step, arrays, {"model": settings.plain(SMALL)})
    checkpoints.close()
    config = {"format": 1, "model": settings.plain(SMALL), "tokenizer": "bytes", "run": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_saved_model_comes_back_to_the_bit(model, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    loaded = store.load(saved.name)
    assert bits(loaded) == bits(model)
    assert loaded.config == model.config
    assert store.fingerprint(loaded) == store.fingerprint(model)
    assert isinstance(store.load_tokenizer(saved), ByteTokenizer)
    tokens = jnp.arange(6)[None]
    assert jnp.array_equal(loaded(tokens)[0], model(tokens)[0])


def test_the_saved_folder_holds_just_what_it_says(saved):
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model"]
    names = ["config.json", "manifest.json", "model.safetensors"]
    assert sorted(p.name for p in saved.iterdir()) == names


def test_bfloat16_weights_stay_bfloat16(model, tmp_path):
    narrow = {name: a.astype(jnp.bfloat16) for name, a in parameters(model).items()}
    store.save(bind(model, narrow), tmp_path / "narrow")
    assert bits(store.load(tmp_path / "narrow")) == bits(bind(model, narrow))


def test_a_fingerprint_knows_weights_names_and_config(model):
    params = parameters(model)
    name = next(iter(params))
    nudged = bind(model, {**params, name: params[name].at[(0,) * params[name].ndim].add(1e-3)})
    assert store.fingerprint(nudged) != store.fingerprint(model)
    other = lm.Config(**{**vars(SMALL), "remat": "all"}).build(rngs=nnx.Rngs(0))
    assert bits(other) == bits(model) and store.fingerprint(other) != store.fingerprint(model)


def test_saving_replaces_a_saved_model(model, saved):
    other = SMALL.build(rngs=nnx.Rngs(1))
    store.save(other, saved)
    assert bits(store.load(saved)) == bits(other)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model"]


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "pytorch_model.bin"])
def test_saving_over_anything_else_is_refused(model, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ModelError, match="choose another path"):
        store.save(model, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_saving_over_a_model_with_notes_beside_it_is_refused(model, saved):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="choose another path"):
        store.save(model, saved)
    assert (saved / "notes.txt").exists()


def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(model, saved):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ModelError, match="cannot be saved as .*: free space"):
            store.save(SMALL.build(rngs=nnx.Rngs(1)), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert bits(store.load(saved)) == bits(model)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model"]


def test_a_tokenizer_travels_with_its_model(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"any": "file"}')
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        saved = store.save(model, tmp_path / "model", tokenizer=str(given))
        assert (saved / "tokenizer.json").read_text() == '{"any": "file"}'
        assert json.loads((saved / "config.json").read_text())["tokenizer"] == "tokenizer.json"
    with pytest.raises(ModelError, match="no tokenizer at"):
        store.save(model, tmp_path / "other", tokenizer=str(tmp_path / "none.json"))
    assert not (tmp_path / "other").exists()


def test_every_flipped_bit_of_a_saved_model_is_refused(saved):
    draw = np.random.default_rng(0)
    for path in sorted(saved.iterdir()):
        good = path.read_bytes()
        for offset in draw.integers(len(good), size=12):
            bad = bytearray(good)
            bad[offset] ^= 1 << int(draw.integers(8))
            path.write_bytes(bad)
            with pytest.raises(CheckpointError):
                store.load(saved)
        path.write_bytes(good)
    store.load(saved)


def test_weights_cut_short_are_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes, not \d+: restore"):
        store.load(saved)


def test_a_pickle_in_the_folder_is_refused(saved):
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match="unpickling runs code: convert it to safetensors"):
        store.load(saved)


def test_a_link_in_the_folder_is_refused(saved):
    (saved / "model.safetensors").rename(saved.parent / "weights")
    (saved / "model.safetensors").symlink_to(saved.parent / "weights")
    with pytest.raises(CheckpointError, match="is a link"):
        store.load(saved)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda path: None, "There is no model at"),
        (lambda path: path.mkdir(), "has no config.json"),
        (lambda path: path.write_text("x"), "has no config.json"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "has no config.json"),
    ],
    ids=["missing", "empty", "a file", "a run without config"],
)
def test_what_is_no_model_is_refused(tmp_path, prepare, says):
    prepare(tmp_path / "model")
    with pytest.raises(ModelError, match=says):
        store.load(tmp_path / "model")


def test_a_config_without_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model.safetensors and no checkpoints: train or save"):
        store.load(saved)


def reseal(folder: pathlib.Path) -> None:
    """As if someone had written all of it so: what the hashes cannot know, the reader must see."""
    artifacts.write_manifest(folder)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"d_model": 32}, ModelError, "of two models"),
        ({"repeats": 3}, ModelError, "of two models"),
        ({"ffn": None}, ModelError, "of another model"),
        ({"d_modell": 16}, ConfigError, "did you mean 'd_model'"),
        ({"d_model": "wide"}, ConfigError, "d_model"),
        ({"d_model": -1}, ConfigError, "at least 1"),
        ({"pattern": [{"mixer": "os.system"}]}, SeqlabError, "os.system"),
    ],
    ids=["shapes", "depth", "names", "unknown field", "type", "range", "mixer"],
)
def test_a_config_that_is_not_of_these_weights_is_refused(saved, change, error, says):
    fields = {**settings.plain(SMALL), **change}
    rewrite(saved / "config.json", model=fields)
    reseal(saved)
    with pytest.raises(error, match=says):
        store.load(saved)


@pytest.mark.parametrize("fields", [[], {}, {"format": 2, "model": {}}, {"format": 1}])
def test_a_config_of_another_format_is_refused(saved, fields):
    (saved / "config.json").write_text(json.dumps(fields))
    reseal(saved)
    with pytest.raises(ModelError, match="of no model that this seqlab knows"):
        store.load(saved)


def test_a_config_nested_without_end_is_refused(saved):
    (saved / "config.json").write_text("[" * 100_000)
    reseal(saved)
    with pytest.raises(CheckpointError, match="not JSON"):
        store.load(saved)


def test_weights_that_are_no_safetensors_are_refused(saved):
    (saved / "model.safetensors").write_bytes(b"\xff" * 100)
    reseal(saved)
    with pytest.raises(CheckpointError, match="is damaged: its header"):
        store.load(saved)


def test_weights_of_another_kind_are_refused(model, saved):
    ints = {name: a.astype(jnp.int32) for name, a in parameters(model).items()}
    safetensors.flax.save_file(ints, saved / "model.safetensors")
    reseal(saved)
    with pytest.raises(ModelError, match="int32"):
        store.load(saved)


def test_a_run_loads_its_newest_checkpoint(model, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    loaded = store.load(run.name)
    assert bits(loaded) == bits(model)
    assert all(isinstance(a, jax.Array) for a in parameters(loaded).values())


def test_a_run_with_a_damaged_newest_step_warns_and_takes_the_one_before(run):
    (run / "checkpoints" / "2" / "contents.json").unlink()
    warnings = []
    loaded = store.load(run, on_warning=warnings.append)
    assert not any(np.any(a) for a in parameters(loaded).values())
    assert len(warnings) == 1 and "checkpoints/2/contents.json is missing" in warnings[0]
    assert (run / "checkpoints" / "2").is_dir()  # a reader renames nothing


def test_a_run_with_no_good_checkpoint_is_an_error(run):
    for step in ("1", "2"):
        (run / "checkpoints" / step / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoints/2 has no readable manifest.json"):
        store.load(run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint: train first"):
        store.load(run)


def test_a_run_whose_config_has_changed_is_refused(run):
    rewrite(run / "config.json", model={**settings.plain(SMALL), "tie_embeddings": False})
    with pytest.raises(CheckpointError, match="config.json is not of the model in"):
        store.load(run)


def test_weights_are_never_written_where_the_process_may_not(model, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "sub").write_text("a file where a folder must be")
    else:
        (tmp_path / "sub").mkdir(mode=0o500)
    with pytest.raises(ModelError, match="cannot be saved as"):
        store.save(model, tmp_path / "sub" / "model")
