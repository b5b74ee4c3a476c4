"""Files of tensors: mapped and read to the bit, refused in a sentence where they are wrong."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from seqlab.errors import CheckpointError, ModelError
from seqlab.models import tensors
from tests.hf_folders import bits

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(jnp.bfloat16),
    "scalar": np.array(0.5, np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
}


def raw(folder: pathlib.Path, header: object, data: bytes = b"", length: int | None = None):
    """A folder with one file of this header and these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / tensors.WEIGHTS).write_bytes(size + text + data)
    return folder


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_file_of_the_safetensors_package_is_read_to_the_bit(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / tensors.WEIGHTS)
    found = tensors.read(tmp_path)
    assert bits(found) == bits(ARRAYS)
    assert isinstance(found["a"].base, np.memmap | np.ndarray) and not found["a"].flags.writeable


@pytest.mark.parametrize("shard", [tensors.SHARD, 20])
def test_what_is_written_the_safetensors_package_reads_to_the_bit(tmp_path, shard):
    turned = {**ARRAYS, "turned": ARRAYS["a"].T}
    tensors.write(tmp_path, turned, shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == 20) == (tmp_path / tensors.INDEX).is_file()
    theirs = {n: a for file in files for n, a in safetensors.numpy.load_file(file).items()}
    assert bits(theirs) == bits(tensors.read(tmp_path)) == bits(turned)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, bytes(7), "'a' overlaps another, leaves a gap, or is cut off"),
        ({"a": entry()}, bytes(9), "1 bytes follow the last tensor"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12), "'b' overlaps"),
        ({"a": entry(begin=4, end=12)}, bytes(12), "'a' overlaps another, leaves a gap"),
        ({"a": entry("BF16")}, bytes(8), "'a' has 8 bytes for bfloat16"),
        ({"a": entry("F33")}, bytes(8), "does not describe 'a'"),
        ({"a": entry(shape=(-1, -2))}, bytes(8), "does not describe 'a'"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "does not describe 'a'"),
        ({"a": entry(shape=(2**40, 2**40))}, bytes(8), "'a' has 8 bytes for"),
        ({"a": entry(begin=-8, end=0)}, bytes(8), "does not describe 'a'"),
        ({"a": [0, 8]}, bytes(8), "does not describe 'a'"),
        ({"a\n\x1b[31m" + "x" * 500: [0]}, b"", r"does not describe 'a\\n\\x1b\[31mx+\.\.\.'"),
        ([1], b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": 1, "a": 2}', b"", "every name once"),
    ],
)
def test_a_wrong_header_is_refused_in_one_sentence(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        tensors.read(raw(tmp_path, header, data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}"])
def test_a_file_cut_short_or_with_an_endless_header_is_refused(tmp_path, content):
    (tmp_path / tensors.WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="cut off or too long"):
        tensors.read(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    tensors.write(tmp_path, ARRAYS, 20)
    return tmp_path


def index(folder: pathlib.Path, **changes) -> dict:
    path = folder / tensors.INDEX
    weight_map = json.loads(path.read_text())["weight_map"] | changes
    path.write_text(json.dumps({"weight_map": {n: f for n, f in weight_map.items() if f}}))
    return weight_map


def test_a_missing_shard_is_named(sharded):
    file = index(sharded)["b"]
    (sharded / file).unlink()
    with pytest.raises(CheckpointError, match=f"lacks '{file}', which its index names"):
        tensors.read(sharded)


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x.bin"],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded, file):
    index(sharded, b=file)
    with pytest.raises(CheckpointError, match=r"no \.safetensors inside the folder"):
        tensors.read(sharded)


@pytest.mark.parametrize("name", ["b", "ghost"])
def test_an_index_that_does_not_say_what_is_in_the_shards_is_refused(sharded, name):
    files = index(sharded)
    index(sharded, **{name: None if name in files else files["b"]})
    with pytest.raises(CheckpointError, match="does not say what is in the shards"):
        tensors.read(sharded)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_is_none_is_refused(sharded, text):
    (sharded / tensors.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="does not map tensors to files"):
        tensors.read(sharded)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        tensors.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match="unpickling runs code.*save_pretrained"):
        tensors.read(tmp_path)
