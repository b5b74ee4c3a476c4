"""Saved models: bit-exact, whole or absent, and loading one runs no code."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.errors import CheckpointError, ConfigError, ModelError
from seqlab.models import artifacts, store
from seqlab.models.parameters import bind, parameters
from tests.leaky import tiny


@pytest.fixture(scope="module")
def model():
    return tiny(seed=1)


@pytest.fixture
def path(model, tmp_path):
    return store.save(model, tmp_path / "models" / "leaky")


def bits(model) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in parameters(model).items()}


def edit(path, change) -> None:
    """Change config.json, and let the manifest vouch for it."""
    fields = json.loads((path / "config.json").read_text())
    change(fields)
    (path / "config.json").write_text(json.dumps(fields))
    artifacts.write_manifest(path)


def test_a_loaded_model_is_the_saved_one_bit_for_bit(model, path):
    loaded = store.load(path)
    assert loaded.config == model.config
    assert bits(loaded) == bits(model)
    assert store.fingerprint(loaded) == store.fingerprint(model)
    assert store.load_tokenizer(path).vocab == 257
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_bfloat16_weights_keep_their_bits(model, tmp_path):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    path = store.save(half, tmp_path / "half")
    with pytest.raises(ModelError, match="bfloat16.* and float32.*two models"):
        store.load(path)
    like = parameters(half)
    assert bits(bind(half, store._weights(path / store.WEIGHTS, like))) == bits(half)


def test_the_fingerprint_changes_with_any_weight_and_with_the_config(model):
    params = parameters(model)
    seen = {store.fingerprint(model), store.fingerprint(tiny(seed=1, max_length=9))}
    for name, array in params.items():
        flat = array.reshape(-1)
        for i in (0, flat.size - 1):
            changed = flat.at[i].set(jnp.nextafter(flat[i], jnp.inf)).reshape(array.shape)
            seen.add(store.fingerprint(bind(model, {**params, name: changed})))
    assert len(seen) == 2 + 2 * len(params)


def test_saving_again_replaces_a_saved_model_and_nothing_else(path, tmp_path):
    other = tiny(seed=2)
    store.save(other, path)
    assert bits(store.load(path)) == bits(other)
    assert [p.name for p in path.parent.iterdir()] == ["leaky"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ModelError, match="holds no saved model: choose another path"):
        store.save(other, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


@pytest.mark.parametrize("failing", ["write_manifest", "rename"])
def test_a_full_disk_leaves_the_model_that_was_there(model, path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "rename":
        real = type(path).rename
        fails = lambda self, to: full() if ".new-" in self.name else real(self, to)
        monkeypatch.setattr(type(path), "rename", fails)
    else:
        monkeypatch.setattr(artifacts, failing, full)
    with pytest.raises(ModelError, match="No space left.*free space"):
        store.save(tiny(seed=2), path)
    assert bits(store.load(path)) == bits(model)
    assert [p.name for p in path.parent.iterdir()] == ["leaky"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_named(path, name):
    os.truncate(path / name, (path / name).stat().st_size // 2)
    with pytest.raises(CheckpointError, match=name):
        store.load(path)


def test_broken_weights_are_refused_even_where_the_manifest_agrees(path):
    os.truncate(path / store.WEIGHTS, 100)
    artifacts.write_manifest(path)
    with pytest.raises(CheckpointError, match="model.safetensors is not readable"):
        store.load(path)


def test_weights_of_other_shapes_or_names_are_refused(path, tmp_path):
    wide = store.save(tiny(d_model=32), tmp_path / "wide")
    shutil.copy(wide / store.WEIGHTS, path / store.WEIGHTS)
    artifacts.write_manifest(path)
    with pytest.raises(ModelError, match="they are of two models"):
        store.load(path)
    edit(wide, lambda fields: fields["model"].update(tie_embeddings=True))
    with pytest.raises(ModelError, match=r"unknown \['head.weight'\]"):
        store.load(wide)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda f: f["model"].update(d_modle=3), ConfigError, "no field 'd_modle': .*'d_model'"),
        (lambda f: f["model"].update(d_model="x"), ConfigError, "d_model = 'x' is wrong"),
        (lambda f: f["model"].pop("vocab"), ConfigError, "lacks the field 'vocab'"),
        (
            lambda f: f["model"]["pattern"][0].update(mixer="lekay"),
            ConfigError,
            "no mixer 'lekay': did you mean 'leaky'",
        ),
        (lambda f: f["model"]["pattern"][0].update(name="x"), ConfigError, "no field 'name'"),
        (lambda f: f["model"]["pattern"][0].pop("mixer"), ConfigError, "names its mixer"),
        (lambda f: f["model"]["pattern"].append(3), ConfigError, "3 is not a mixer config"),
        (lambda f: f.update(format=2), ModelError, "no model that this seqlab knows"),
        (lambda f: f.pop("model"), ModelError, "no model that this seqlab knows"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(path, change, error, message):
    edit(path, change)
    with pytest.raises(error, match=message):
        store.load(path)


def test_what_is_no_model_is_refused(tmp_path, path):
    with pytest.raises(ModelError, match="There is no model at"):
        store.load(tmp_path / "none")
    with pytest.raises(ModelError, match="has no config.json"):
        store.load(tmp_path)
    (path / store.WEIGHTS).unlink()
    with pytest.raises(ModelError, match="has no model.safetensors and no checkpoints"):
        store.load(path)
    (path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        store.load(path)


def test_a_pickle_in_the_folder_is_refused_unread(path, tmp_path):
    mark = tmp_path / "it ran"
    (path / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch \"%s\"'\ntR." % str(mark).encode()
    )
    artifacts.write_manifest(path)
    with pytest.raises(CheckpointError, match="unpickling runs code"):
        store.load(path)
    assert not mark.exists()


def test_links_and_files_beside_the_manifest_are_refused(path):
    (path / "notes.txt").write_text("added later")
    with pytest.raises(CheckpointError, match="notes.txt is not in the manifest"):
        store.load(path)
    (path / "notes.txt").unlink()
    (path / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link"):
        store.load(path)
