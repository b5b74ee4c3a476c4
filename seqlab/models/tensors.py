"""A folder of safetensors files as lazy arrays: nothing is read until it is indexed.

The format: 8 bytes n (little-endian), n bytes of JSON `{name: {dtype, shape, data_offsets}}`, then
the tensors end to end. A folder holds model.safetensors, or shards that
model.safetensors.index.json lists. Files are mapped, so a tensor costs memory only where its bytes
are looked at, and a device reads only its slice.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from seqlab.errors import CheckpointError, ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes, the most in one file that we write
ALIGNED = 64  # bytes: where arrays of a CPU device begin
LARGEST_HEADER = 100 * 2**20  # bytes; the safetensors package allows as much
DTYPES = {
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
}


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder by name, mapped; raises where a file is missing or damaged.

    ModelError where the folder holds no safetensors, CheckpointError where a file is not what the
    format says, or the index and its shards disagree.
    """
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / WEIGHTS).is_file():
        return dict(mapped(folder / WEIGHTS))
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder} holds its weights as .bin, a pickle, and unpickling runs code: load and "
            "save the model once with transformers, whose save_pretrained writes safetensors."
        )
    raise ModelError(f"{folder} holds no {WEIGHTS}: give the folder of a whole model.")


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shard: int = SHARD) -> None:
    """Write tensors as one file, or as shards of at most `shard` bytes and their index."""
    groups = list(_shards(tensors, shard))
    if len(groups) == 1:
        _write(folder / WEIGHTS, groups[0], tensors)
        return
    weight_map = {}
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        _write(folder / file, names, tensors)
        weight_map |= dict.fromkeys(names, file)
    total = sum(_bytes(tensors[name]) for name in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def mapped(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and mapped array of every tensor in a file, whose header is checked as a whole."""
    size = path.stat().st_size
    header, start = _header(path, size)
    end = 0
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    for begin, stop, name, dtype, shape in sorted(_entries(path, header)):
        if begin != end or stop > size - start:
            raise _damaged(path, f"{shown(name)} overlaps another, leaves a gap, or is cut off")
        if stop - begin != math.prod(shape) * dtype.itemsize:
            raise _damaged(path, f"{shown(name)} has {stop - begin} bytes for {dtype}{shape}")
        yield name, data[start + begin : start + stop].view(dtype).reshape(shape)
        end = stop
    if end != size - start:
        raise _damaged(path, f"{size - start - end} bytes follow the last tensor")


def _sharded(folder: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        plain = all(pathlib.PurePath(file).name == file and "\\" not in file for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{folder / INDEX} does not map tensors to files: restore the file from a copy."
        ) from None
    if not plain or not all(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{folder / INDEX} names a file that is no .safetensors inside the folder: "
            "do not use this model."
        )
    tensors, source = {}, {}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder} lacks {shown(file)}, which its index names: get the rest of the model."
            )
        for name, array in mapped(folder / file):
            tensors[name] = array
            source[name] = file
    wrong = sorted(weight_map.items() ^ source.items())
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} does not say what is in the shards, first about "
            f"{shown(wrong[0][0])}: they are of two models."
        )
    return tensors


def _header(path: pathlib.Path, size: int) -> tuple[dict[str, Any], int]:
    """The JSON at the head of a file, and where the tensors begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise _damaged(path, "its header is cut off or too long")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON with every name once") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _entries(path: pathlib.Path, header: dict) -> Iterator[tuple[int, int, str, np.dtype, tuple]]:
    for name, about in header.items():
        try:
            begin, stop = about["data_offsets"]
            dtype, shape = jnp.dtype(DTYPES[about["dtype"]]), tuple(about["shape"])
            whole = all(type(n) is int and n >= 0 for n in (begin, stop, *shape))
        except (TypeError, ValueError, KeyError):
            whole = False
        if not whole or len(shape) > 16:
            raise _damaged(path, f"it does not describe {shown(name)} in a way known here")
        yield begin, stop, name, dtype, shape


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _shards(tensors: Mapping[str, Any], largest: int) -> Iterator[list[str]]:
    names, held = [], 0
    for name in tensors:
        size = _bytes(tensors[name])
        if names and held + size > largest:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _write(path: pathlib.Path, names: Iterable[str], tensors: Mapping[str, Any]) -> None:
    # what is not contiguous the package would write in the order of its memory
    arrays = {name: np.asarray(tensors[name], order="C") for name in names}
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})  # transformers asks for it


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize


def own(parts: Sequence[Any], dtype: Any) -> np.ndarray:
    """Arrays of one shape, stacked in memory that is nobody else's and that a CPU device takes over
    as it is: what does not lie as it wants it copies, and keeps meanwhile."""
    dtype, shape = jnp.dtype(dtype), (len(parts), *parts[0].shape)
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    stacked = room[start : start + size].view(dtype).reshape(shape)
    for i, part in enumerate(parts):
        stacked[i] = part
    return stacked


def shown(name: str) -> str:
    """A name from a file, fit for a message: on one line, and not too long."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _damaged(path: pathlib.Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}: restore the file from a copy.")
