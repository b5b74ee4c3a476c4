"""Packed models: made by the command, read back, the same numbers or as near as they should be."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import typer.testing
from flax import nnx

import seqlab
from seqlab import cli
from seqlab.conformance.tolerance import assert_close
from seqlab.errors import CheckpointError, ConfigError
from seqlab.kernels.ternary_matmul.packing import unpack
from seqlab.kernels.trit_planes import restored
from seqlab.layers import int8_linear, ptqtp_linear
from seqlab.layers.linear import Linear
from seqlab.layers.mixers import gla
from seqlab.models import artifacts, calibrate, lm, pack, store
from seqlab.models.parameters import bind, parameters
from seqlab.train import config as train_config
from seqlab.train.data import Data
from seqlab.train.sources import Text

CONFIG = lm.Config(
    vocab=257,
    d_model=128,
    pattern=(gla.Config(heads=2, conv_width=0),),
    repeats=2,
    dtype="float32",
    tie_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 40))
LARGE, GAIN = 17, 60.0  # the feature of the stream that is made an outlier, and how much larger

logits = jax.jit(lambda model, tokens: model(tokens)[0])


def built(linear: str) -> lm.LM:
    return dataclasses.replace(CONFIG, linear=linear).build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def bit() -> lm.LM:
    return built("bit")


@pytest.fixture(scope="module")
def dense() -> lm.LM:
    """Its projections read one feature that is large, and make little of it."""
    params = dict(parameters(built("dense")))
    for norm, readers in (("mixer", ("mixer.qkv", "mixer.gate")), ("ffn", ("ffn.gate", "ffn.up"))):
        name = f"blocks.0.{norm}_norm.weight"
        params[name] = params[name].at[:, LARGE].multiply(GAIN)
        for name in (f"blocks.0.{reader}.weight" for reader in readers):
            params[name] = params[name].at[:, LARGE].divide(GAIN)
    return bind(built("dense"), params)


@pytest.fixture(scope="module")
def saved(bit, dense, tmp_path_factory) -> pathlib.Path:
    """A folder with the saved models bit and dense, and ternary, which the command packed."""
    folder = tmp_path_factory.mktemp("models")
    store.save(bit, folder / "bit")
    store.save(dense, folder / "dense")
    (folder / "text").write_text("pieces equal the whole. " * 40)
    said = command(folder, "bit", "ternary", "--pack", "ternary")
    assert said.startswith(f"{folder / 'ternary'} is a saved model for inference")
    return folder


def command(folder: pathlib.Path, source: str, target: str, *options: str) -> str:
    arguments = ["convert", str(folder / source), str(folder / target), *options]
    done = typer.testing.CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    return done.output


def test_ternary_is_the_model_that_was_trained_to_the_bit(bit, saved):
    ternary = seqlab.load(saved / "ternary")
    np.testing.assert_array_equal(logits(ternary, TOKENS), logits(bit, TOKENS))
    prompt = [256, *b"pieces equal"]
    expected = seqlab.generate(bit, prompt, steps=8)
    np.testing.assert_array_equal(seqlab.generate(ternary, prompt, steps=8), expected)
    assert store.load_tokenizer(saved / "ternary").vocab == 257


def test_ternary_takes_seven_times_less_memory_than_bfloat16(bit, saved):
    """As loaded, array by array."""
    held = parameters(seqlab.load(saved / "ternary"))
    weights = parameters(bit).keys() - held.keys()
    assert {name.rpartition(".")[0] for name in weights} == {
        *(f"blocks.0.ffn.{name}" for name in ("gate", "up", "down")),
        *(f"blocks.0.mixer.{name}" for name in ("qkv", "gate", "out")),
        "head",
    }
    paths = [name.removesuffix("weight") for name in weights]
    packed = sum(held[path + kind].nbytes for path in paths for kind in ("codes", "scale"))
    in_bfloat16 = sum(2 * parameters(bit)[name].size for name in weights)
    assert in_bfloat16 > 7.9 * packed
    assert pack.projection_bytes(seqlab.load(saved / "ternary")) == (packed, in_bfloat16)


@pytest.mark.parametrize("how, bits", [("ternary", 1.6), ("ptqtp", 3 * 1.6)])
def test_squeezed_files_are_smaller_and_the_same_model(saved, tmp_path, how, bits):
    source = "bit" if how == "ternary" else "dense"
    command(saved, source, str(tmp_path / "plain"), "--pack", how)
    command(saved, source, str(tmp_path / "squeezed"), "--pack", how, "--squeeze")
    plain, squeezed = (parameters(seqlab.load(tmp_path / n)) for n in ("plain", "squeezed"))
    stored = safetensors.flax.load_file(tmp_path / "squeezed" / store.WEIGHTS)
    fives = {name: a for name, a in stored.items() if name.endswith(".fives")}
    down = next(a for name, a in fives.items() if "ffn.down" in name)
    assert down.nbytes * 8 == pytest.approx(bits * 2 * 352 * 128, rel=0.02)
    assert len(fives) == sum(a.dtype == jnp.uint8 for a in plain.values()) > 5
    for name, array in plain.items():
        np.testing.assert_array_equal(squeezed[name], array)


def test_ptqtp_is_the_model_with_its_weights_restored(dense):
    """Compiled as a whole, where a compiler may go wrong in sums over planes."""
    config = ptqtp_linear.Config(planes=2, planes_of=(("down", 3),))
    packed = pack.ptqtp(dense, config)
    params, ours = dict(parameters(dense)), parameters(packed)
    assert ours["blocks.0.ffn.down.planes"].shape[:2] == (2, 3)
    assert ours["blocks.0.ffn.up.planes"].shape[:2] == (2, 2)
    for name in params.keys() - ours.keys():
        path, K = name.removesuffix(".weight"), params[name].shape[-2]
        layers = zip(ours[f"{path}.planes"], ours[f"{path}.scales"], strict=True)
        near = jnp.stack([restored(unpack(planes, K), scales) for planes, scales in layers])
        away = jnp.linalg.norm(near - params[name]) / jnp.linalg.norm(params[name])
        assert away < (0.08 if "down" in name else 0.18)
        params[name] = near
    assert_close(logits(packed, TOKENS), logits(bind(dense, params), TOKENS))


def test_int8_keeps_the_inputs_that_were_large_and_is_near(dense, saved, tmp_path):
    options = ("--pack", "int8", "--calibrate", str(saved / "text"))
    command(saved, "dense", str(tmp_path / "int8"), *options)
    packed = seqlab.load(tmp_path / "int8")
    config = packed.config.linear
    most = dict(config.outliers)
    assert most["qkv"] >= 1 and most["up"] >= 1
    params = parameters(packed)
    assert (params["blocks.0.mixer.qkv.outliers"] == LARGE).any(-1).all()
    assert params["blocks.0.mixer.qkv.codes"].dtype == jnp.int8
    assert not params["blocks.0.mixer.qkv.codes"][:, LARGE].any()
    # without them the large ones take the eight bits from all others
    blunt = pack.int8(dense, dataclasses.replace(config, threshold=1e9), [TOKENS])
    assert dict(blunt.config.linear.outliers)["qkv"] == 0
    expected = logits(dense, TOKENS)
    away = lambda model: float(jnp.linalg.norm(logits(model, TOKENS) - expected))
    assert away(packed) < 0.5 * away(blunt) < 0.5 * float(jnp.linalg.norm(expected))


def test_calibration_sees_what_every_projection_reads(dense):
    names = ["blocks.0.mixer.qkv", "blocks.0.ffn.down"]
    seen = calibrate.largest_inputs(dense, names, [TOKENS[:1], TOKENS[1:]])
    assert {n: a.shape for n, a in seen.items()} == {names[0]: (2, 128), names[1]: (2, 352)}
    block = jax.tree.map(lambda a: a[0], dense.blocks[0])
    read = block.mixer_norm(dense.embed.weight[...][TOKENS])
    np.testing.assert_allclose(seen[names[0]][0], jnp.abs(read).max((0, 1)), rtol=1e-5)
    assert type(dense.blocks[0].ffn.down) is Linear, "the model itself stays as it is"


def test_int8_of_a_matrix_is_as_near_as_rows_and_columns_of_eight_bits_are():
    linear = Linear(256, 128, ("embed", "ffn"), bias=True, rngs=nnx.Rngs(0))
    config = int8_linear.Config(outliers=(("up", 4),))
    made, x = config.replace(linear, "up"), jax.random.normal(jax.random.key(1), (64, 256))
    x = x.at[:, 7].multiply(50)
    arrays = config.quantized(linear.weight[...], "up", np.abs(x).max(0))
    for name, array in arrays.items():
        assert (getattr(made, name).shape, getattr(made, name).dtype) == (array.shape, array.dtype)
        setattr(made, name, nnx.Param(array))
    assert arrays["outliers"][0] == 7
    away = jnp.linalg.norm(made(x) - linear(x)) / jnp.linalg.norm(linear(x))
    assert 1e-4 < away < 0.008
    codes = arrays["codes"] * arrays["scale"]
    codes = codes.at[arrays["outliers"]].set(linear.weight[...][arrays["outliers"]])
    near = jnp.linalg.norm(codes - linear.weight[...]) / jnp.linalg.norm(linear.weight[...])
    assert 0.005 < near < 0.008


@pytest.mark.parametrize(
    "source, options, sentence",
    [
        ("dense", "--pack ternary", "linear='dense' cannot be packed as ternary: pack it as ptqtp"),
        ("bit", "--pack ptqtp", "linear='bit' cannot be packed as ptqtp: pack it as ternary"),
        ("ternary", "--pack ternary", "packed already, as ternary: give the one it was made of"),
        ("dense", "--pack int8", "takes --calibrate FILE"),
        ("bit", "--pack ternary --calibrate text", "takes --calibrate FILE"),
        ("dense", "--pack int8 --calibrate none", "none cannot be read"),
        ("dense", "--pack int8 --calibrate /dev/null", "/dev/null is empty: give a text"),
        ("dense", "--pack int8 --calibrate text --squeeze", "no trits: leave --squeeze"),
        ("bit", "--pack ternary eps=1", "stays as it was trained: leave 'eps=1'"),
        ("dense", "--pack ptqtp plane=2", "no field 'plane'"),
        ("dense", "--squeeze", "are for --pack"),
        ("ternary", "", "No published family can express this model: save it with seqlab.save"),
    ],
)
def test_what_cannot_be_packed_is_refused(saved, tmp_path, monkeypatch, source, options, sentence):
    monkeypatch.chdir(saved)
    with pytest.raises(seqlab.SeqlabError, match=sentence):
        command(saved, source, str(tmp_path / "new"), *options.split())
    assert not (tmp_path / "new").exists()


def test_a_packed_model_is_not_trained(saved, tmp_path):
    packed = seqlab.load(saved / "ternary").config
    fields = {"data": Data(train=(Text(files=("none",)),)), "steps": 1}
    sentence = "linear='ternary' cannot be trained: train with linear='bit', and pack the result"
    with pytest.raises(ConfigError, match=sentence):
        train_config.Config(model=packed, **fields)
    with pytest.raises(ConfigError, match=sentence):
        seqlab.build(packed)
    with pytest.raises(ConfigError, match="ternary but a folder: .* packed model is for inference"):
        train_config.load(saved / "ternary")


def test_a_run_does_not_go_on_from_a_saved_model(saved):
    from seqlab.train import folder

    data = Data(train=(Text(files=("none",)),))
    with pytest.raises(ConfigError, match="ternary is a saved model, which no run can go on from"):
        folder.check(saved / "ternary", train_config.Config(model=CONFIG, data=data, steps=1))


@pytest.mark.parametrize("squeeze", [False, True])
def test_a_packed_file_that_is_damaged_is_refused(bit, tmp_path, squeeze):
    """A byte that fell over, and one with the hash to match."""
    path = store.save(pack.ternary(bit), tmp_path / "model", squeeze=squeeze)
    file = path / store.WEIGHTS
    arrays = safetensors.flax.load_file(file)
    name = next(name for name, a in arrays.items() if a.dtype == jnp.uint8)
    arrays[name] = arrays[name].at[(0,) * arrays[name].ndim].set(1 if squeeze else 255)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="not as it was written: restore it"):
        seqlab.load(path)
    safetensors.flax.save_file(arrays, file)
    artifacts.write_manifest(path)
    with pytest.raises(CheckpointError, match="is not made of trits: restore the file"):
        seqlab.load(path)
