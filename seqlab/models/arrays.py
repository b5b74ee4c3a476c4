"""Named arrays in a checkpoint step: orbax holds the numbers, `contents.json` what they must be."""

import json
import pathlib
import warnings
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp

from seqlab.errors import CheckpointError

CONTENTS = "contents.json"


def groups(arrays: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """`{"params/a": x}` -> `{"params": {"a": x}}`: what is read apart is stored apart."""
    apart: dict[str, dict] = {}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        apart.setdefault(group, {})[rest] = array
    return apart


def describe(arrays: Mapping) -> dict[str, list]:
    """Name -> [dtype, shape], as JSON."""
    return {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}


def read_contents(step: pathlib.Path) -> dict:
    """The JSON written beside the arrays: `arrays` as `describe` says, and `metadata`."""
    try:
        contents = json.loads((step / CONTENTS).read_text("utf-8"))
        if isinstance(contents["arrays"], dict) and isinstance(contents["metadata"], dict):
            return contents
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{step / CONTENTS} is not readable: the checkpoint is damaged.")


def read_arrays(
    step: pathlib.Path, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays named by `like`, placed as its shardings say; the caller has verified the folder.

    Raises CheckpointError where names, shapes or dtypes differ. Whole groups (the part of a name
    before the first slash) that `like` does not name are not read.
    """
    wanted = groups(like)
    held = {
        name: kind
        for name, kind in read_contents(step)["arrays"].items()
        if name.partition("/")[0] in wanted
    }
    _compare(step, held, describe(like))
    restore = {group: ocp.args.StandardRestore(tree) for group, tree in wanted.items()}
    try:
        with (
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # orbax's remarks on how it was called
            restored = checkpointer.restore(
                (step / "arrays").absolute(), args=ocp.args.Composite(**restore)
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{step} cannot be read ({type(error).__name__}).") from error
    return {f"{g}/{name}": array for g in wanted for name, array in restored[g].items()}


def _compare(step: pathlib.Path, held: Mapping, wanted: Mapping) -> None:
    different = [name for name in sorted({**held, **wanted}) if held.get(name) != wanted.get(name)]
    if not different:
        return
    say = lambda kind: "absent" if kind is None else f"{kind[0]}{kind[1]}"
    first = "; ".join(f"{n}: {say(held.get(n))}, not {say(wanted.get(n))}" for n in different[:3])
    raise CheckpointError(
        f"{step} holds another model: {len(different)} arrays differ ({first}): "
        "use the config it was trained with."
    )
