"""Whether a disk has room for what a linearization will write, asked before anything is trained."""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

from seqlab.errors import ConfigError
from seqlab.train import readable

STATES = 3  # of a weight that trains: itself and two moments, float32 each


def checkpoints(trained: Sequence[int], keep: int) -> int:
    """Bytes of the checkpoints of stages that train so many numbers each: `keep` of every one stay,
    and one more stands beside them while it is written."""
    each = [4 * STATES * count for count in trained]
    return keep * sum(each) + max(each, default=0)


def require(needs: Mapping[pathlib.Path, int]) -> None:
    """Raises ConfigError where the disks of these folders, which need not be there yet, have less
    room than so many bytes beside what lies in the folders already."""
    disks: dict[int, list] = {}
    for folder, needed in needs.items():
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        disks.setdefault(os.stat(place).st_dev, []).append((place, needed - _held(folder)))
    for asked in disks.values():
        place, needed = asked[0][0], sum(max(0, more) for _, more in asked)
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
