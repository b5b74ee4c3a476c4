"""Whether disks have room for what a linearization will write, asked before anything is trained."""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

from seqlab.errors import ConfigError
from seqlab.train import readable
from seqlab.train.config import Checkpoint

HELD = 12  # bytes in a checkpoint of a number that trains: itself and two moments, float32 each


def checkpoints(trained: Sequence[int]) -> int:
    """Bytes of the checkpoints of stages that train so many numbers each: those that stay of every
    stage, and one that is being written."""
    each = [HELD * count for count in trained]
    return Checkpoint().keep * sum(each) + max(each, default=0)


def require(needs: Mapping[pathlib.Path, int]) -> None:
    """Raises ConfigError where the disks of these folders, which need not be there yet, have less
    room than so many bytes, of which the folders may hold a part already."""
    disks: dict[int, list[tuple[pathlib.Path, int]]] = {}
    for folder, needed in needs.items():
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        missing = max(0, needed - _held(folder))
        disks.setdefault(os.stat(place).st_dev, []).append((place, missing))
    for asked in disks.values():
        place, needed = asked[0][0], sum(missing for _, missing in asked)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ConfigError(
                f"The disk of {place} has {readable.size(free)} free, and checkpoints, the result "
                f"and its export take up to {readable.size(needed)}: free space, or choose another "
                "disk."
            )


def _held(folder: pathlib.Path) -> int:
    files = folder.rglob("*") if folder.is_dir() else ()
    return sum(file.stat().st_size for file in files if file.is_file())
