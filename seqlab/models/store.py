"""Models in folders: saved by `save`, read back by `load`, which also reads run folders.

A saved model is config.json (plain JSON), model.safetensors and a manifest of hashes; with a
tokenizer file of its own, that too. Loading validates everything and runs no code.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import safetensors
import safetensors.flax
from flax import nnx

from seqlab import settings
from seqlab.errors import CheckpointError, ModelError
from seqlab.models import artifacts, lm
from seqlab.models import tokenizer as tokenizers
from seqlab.models.arrays import read_arrays
from seqlab.models.parameters import bind, parameters
from seqlab.models.tokenizer import Tokenizer

FORMAT = 1
WEIGHTS = "model.safetensors"


def save(model: lm.LM, path: str | os.PathLike, *, tokenizer: str = "bytes") -> pathlib.Path:
    """Write a model as a folder, whole or not at all; replaces a saved model that is there.

    tokenizer: "bytes", or the path of a tokenizer.json, which is copied into the folder.
    """
    path = pathlib.Path(path)
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not free and not (path / WEIGHTS).exists():
        raise ModelError(f"{path} exists and holds no saved model: choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        if tokenizer != "bytes":
            copy_tokenizer(tokenizer, aside)
        config = {"format": FORMAT, "model": settings.plain(model.config), "tokenizer": tokenizer}
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        safetensors.flax.save_file(parameters(model), aside / WEIGHTS, {"format": "seqlab"})
        artifacts.write_manifest(aside)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return path


def load(path: str | os.PathLike) -> lm.LM:
    """The model in a saved folder, or in the newest good checkpoint of a run folder.

    Raises ModelError where the folder is no model, CheckpointError where it is damaged.
    """
    path = pathlib.Path(path)
    config = _config(path)
    skeleton = jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    if (path / "checkpoints").is_dir():
        return bind(skeleton, _newest(path / "checkpoints", parameters(skeleton)))
    artifacts.refuse_pickles(path)
    if not (path / WEIGHTS).is_file():
        raise ModelError(
            f"{path} has no {WEIGHTS} and no checkpoints: train or save a model first."
        )
    artifacts.verify(path)
    return bind(skeleton, _weights(path / WEIGHTS, parameters(skeleton)))


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that a saved model or a run was trained with."""
    path = pathlib.Path(path)
    spec, own = _fields(path).get("tokenizer", "bytes"), path / "tokenizer.json"
    return tokenizers.load_tokenizer(str(own) if own.is_file() else str(spec))


def copy_tokenizer(spec: str, folder: pathlib.Path) -> None:
    """Put the tokenizer.json that `spec` names (itself or its folder) into a folder."""
    source = pathlib.Path(spec)
    shutil.copyfile(
        source / "tokenizer.json" if source.is_dir() else source, folder / "tokenizer.json"
    )


def fingerprint(model: lm.LM) -> str:
    """sha256 over the config and every weight: what ties a saved session to its model."""
    digest = hashlib.sha256(json.dumps(settings.plain(model.config), sort_keys=True).encode())
    for name, array in sorted(parameters(model).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _fields(path: pathlib.Path) -> dict:
    if not path.exists():
        raise ModelError(f"There is no model at {path}: give a run folder or a saved model.")
    try:
        fields = json.loads((path / "config.json").read_text("utf-8"))
    except OSError:
        raise ModelError(
            f"{path} has no config.json: give a run folder or a saved model."
        ) from None
    except ValueError:
        raise CheckpointError(f"{path / 'config.json'} is not JSON: restore the file.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or "model" not in fields:
        raise ModelError(
            f"{path / 'config.json'} is of no model that this seqlab knows: update it."
        )
    return fields


def _config(path: pathlib.Path) -> lm.Config:
    return settings.read(lm.Config, _fields(path)["model"], where=str(path / "config.json"))


def _newest(folder: pathlib.Path, like: dict) -> dict[str, jax.Array]:
    steps = [p for p in folder.iterdir() if p.name.isascii() and p.name.isdigit()]
    fault = None
    for step in sorted(steps, key=lambda p: int(p.name), reverse=True):
        try:
            artifacts.refuse_pickles(step)
            artifacts.verify(step)
        except CheckpointError as error:
            fault = fault or error
            continue
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        named = {
            f"params/{name}": jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
            for name, a in like.items()
        }
        return {n.removeprefix("params/"): a for n, a in read_arrays(step, named).items()}
    raise CheckpointError(
        str(fault) if fault else f"{folder} holds no checkpoint yet: train first."
    )


def _weights(path: pathlib.Path, like: dict) -> dict[str, jax.Array]:
    try:
        arrays = safetensors.flax.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is not readable ({error}): restore the file.") from None
    for name in arrays.keys() & like.keys():
        if (arrays[name].shape, arrays[name].dtype) != (like[name].shape, like[name].dtype):
            raise ModelError(
                f"{path}: {name} is {arrays[name].dtype}{list(arrays[name].shape)} and "
                f"{like[name].dtype}{list(like[name].shape)} in its config: they are of two models."
            )
    return arrays
