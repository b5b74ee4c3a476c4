"""Named arrays in a checkpoint step: orbax holds the numbers, `contents.json` what they must be.

Orbax alone casts to whatever dtype it is asked for and passes over flipped bits, so names, shapes
and dtypes are compared here, and the hashes of the folder before (`artifacts.verify`).
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from seqlab.errors import CheckpointError

ARRAYS = "arrays"
CONTENTS = "contents.json"


def steps(folder: pathlib.Path) -> list[int]:
    """The steps in a folder of checkpoints, whole or damaged, oldest first; junk is passed over."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and n == str(int(n)))


def groups(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"params/a": x}` -> `{"params": {"a": x}}`: what is read apart is stored apart."""
    apart: dict[str, dict] = {}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        apart.setdefault(group, {})[rest] = array
    return apart


def describe(arrays: Mapping[str, Any]) -> dict[str, list]:
    """Name -> [dtype, shape], as JSON."""
    return {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}


def read_contents(step: pathlib.Path) -> dict[str, dict]:
    """The JSON written beside the arrays: `arrays` as `describe` says, and `metadata`."""
    try:
        contents = json.loads((step / CONTENTS).read_text("utf-8"))
        if isinstance(contents["arrays"], dict) and isinstance(contents["metadata"], dict):
            return contents
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{step / CONTENTS} is not readable: the checkpoint is damaged.")


def read_arrays(
    step: pathlib.Path, like: Mapping[str, jax.ShapeDtypeStruct], *, only: str | None = None
) -> dict[str, jax.Array]:
    """The arrays named by `like`, placed as its shardings say; the caller has verified the folder.

    Raises CheckpointError where names, shapes or dtypes differ. With `only`, the other groups (the
    part of a name before the first slash) are neither compared nor read.
    """
    held = read_contents(step)["arrays"]
    _compare(step, {n: k for n, k in held.items() if only in (None, n.partition("/")[0])}, like)
    restore = {group: ocp.args.StandardRestore(tree) for group, tree in groups(like).items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                (step / ARRAYS).absolute(), args=ocp.args.Composite(**restore)
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{step} cannot be read ({type(error).__name__}).") from error
    found = {name: name.partition("/") for name in like}
    return {name: restored[group][rest] for name, (group, _, rest) in found.items()}


def _compare(step: pathlib.Path, held: Mapping[str, list], like: Mapping[str, Any]) -> None:
    wanted = describe(like)
    different = [name for name in sorted({**held, **wanted}) if held.get(name) != wanted.get(name)]
    if not different:
        return
    say = lambda kind: "absent" if kind is None else f"{kind[0]}{kind[1]}"
    first = "; ".join(f"{n}: {say(held.get(n))}, not {say(wanted.get(n))}" for n in different[:3])
    raise CheckpointError(
        f"The checkpoint {step} is of another model: {len(different)} arrays differ ({first}): "
        "use the config it was trained with."
    )
