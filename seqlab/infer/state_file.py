"""Sessions at rest: one safetensors file with the state, the next logits and where the text stands.

Metadata says which format this is, which model wrote it, and the sha256 of the tensors; a file that
disagrees with the model or with itself is refused.
"""

import contextlib
import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from seqlab.errors import ModelError
from seqlab.infer.decode import Carry
from seqlab.layers.mixer import State
from seqlab.models.store import fingerprint

FORMAT = "seqlab.session.1"


def write(path: Any, model: Any, carry: Carry, position: np.ndarray, finish: np.ndarray) -> None:
    """Write all of it beside `path`, then rename; raises ModelError where that fails."""
    path = pathlib.Path(path)
    state = {f"state.{name}": np.asarray(leaf) for name, leaf in _named(carry.state).items()}
    tensors = {**state, "logits": np.asarray(carry.logits), "position": position, "finish": finish}
    about = {"format": FORMAT, "model": fingerprint(model), "sha256": _digest(tensors)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(save(tensors, about))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ModelError(
            f"The state file {path} cannot be written ({error.strerror}): choose another place."
        ) from None


def read(path: Any, model: Any) -> tuple[Carry, np.ndarray, np.ndarray]:
    """-> carry, position [B], finish [B] as `write` got them; raises ModelError if damaged."""
    path = pathlib.Path(path)
    about, tensors = _read(path)
    if about.get("format") != FORMAT:
        raise ModelError(
            f"{path} is no saved session: give a file that --save-state or Session.save wrote."
        )
    if about.get("model") != fingerprint(model):
        raise ModelError(
            f"The state file {path} was saved by another model: use the model that wrote it."
        )
    names = _named(jax.eval_shape(lambda: model.init_state(1)))
    expected = {f"state.{name}" for name in names} | {"logits", "position", "finish"}
    if set(tensors) != expected or about.get("sha256") != _digest(tensors):
        raise _damaged(path, "its tensors are not those that were saved")
    structure = jax.tree.structure(jax.eval_shape(lambda: model.init_state(1)))
    state = structure.unflatten([tensors[f"state.{name}"] for name in names])
    wrong = mismatch(model, state, len(tensors["position"]))
    if wrong:
        raise _damaged(path, wrong)
    carry = Carry(jax.tree.map(jnp.asarray, state), jnp.asarray(tensors["logits"]))
    return carry, tensors["position"], tensors["finish"]


def mismatch(model: Any, state: State, batch: int) -> str | None:
    """How a state differs from the model's for so many rows, in a few words; None if it fits."""
    expected = jax.eval_shape(lambda: model.init_state(batch))
    if jax.tree.structure(state) != jax.tree.structure(expected):
        return "it has other parts"
    for (name, want), leaf in zip(_named(expected).items(), jax.tree.leaves(state), strict=True):
        if (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
            return f"{name} is {leaf.dtype}{list(leaf.shape)}, not {want.dtype}{list(want.shape)}"
    return None


def _read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, " ".join(str(error).split())) from None
    except OSError as error:
        reason = error.strerror or "no such file"
        raise ModelError(f"The state file {path} cannot be read ({reason}).") from None


def _damaged(path: pathlib.Path, reason: str) -> ModelError:
    return ModelError(
        f"The state file {path} is damaged or no state file ({reason}): save it anew."
    )


def _named(state: State) -> dict[str, Any]:
    """Leaves by their paths, as '0.mixer.memory' for the memory of the first block's mixer."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
