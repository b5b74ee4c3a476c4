"""Models in folders: saved by `save`, read back by `load`, which also reads run folders.

A saved model is config.json (plain JSON), model.safetensors and a manifest of hashes; with a
tokenizer file of its own, that too. A folder that is no model itself but holds one in `model/`, as
a linearization leaves it, is read as that one. Loading validates everything and runs no code.
"""

import hashlib
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax

from seqlab import settings
from seqlab.errors import CheckpointError, ModelError
from seqlab.models import artifacts, lm, pretrained, published_tokenizer, tensors, trits
from seqlab.models import tokenizer as tokenizers
from seqlab.models.arrays import read_arrays, read_contents, steps
from seqlab.models.artifacts import MANIFEST
from seqlab.models.layout import Layout, restacked
from seqlab.models.parameters import axes, bind, largest_first, parameters
from seqlab.models.published_tokenizer import FILES as TOKENIZER_FILES
from seqlab.models.published_tokenizer import TOKENIZER
from seqlab.models.tokenizer import Tokenizer
from seqlab.parallel.mesh import placed, weight_sharding

FORMAT = 1
WEIGHTS = "model.safetensors"
INNER = "model"  # a saved model in a folder that tells how it was made
PARAMS = "params/"  # what the names of the weights begin with in a checkpoint


def save(
    model: lm.LM,
    path: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = "bytes",
    squeeze: bool = False,
) -> pathlib.Path:
    """Write a model as a folder, whole or not at all; replaces a saved model that is there.

    tokenizer: "bytes", or the path of a tokenizer.json, or of a folder with one; it is copied, and
    what a published folder has beside it (its chat template among others) too. None is none.
    squeeze: store the weights of a packed model at 1.6 bits where they are trits, not at two.
    Raises ModelError where the path holds anything else or cannot be written.
    """
    path = pathlib.Path(path).resolve()
    if not _replaceable(path):
        raise ModelError(f"{path} exists and is no saved model alone: choose another path.")
    aside = path.with_name(f".{path.name}.saving-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        params = parameters(model)
        _write(aside, model, trits.squeezed(params) if squeeze else params, tokenizer)
        artifacts.publish(aside, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(
            f"The model cannot be saved as {path} ({reason}): free space, or choose a folder "
            "you can write."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def load(
    path: str | os.PathLike,
    *,
    max_length: int | None = None,
    layout: Layout | None = None,
    on_warning: Callable[[str], object] = warnings.warn,
) -> lm.LM:
    """The model in a saved folder, in the newest good checkpoint of a run folder, or in a published
    folder (config.json and safetensors as transformers writes them; see `pretrained.load`).

    max_length is for a published model: the tokens of a document that its full attention holds; by
    default what it was trained for, but 4096 at most. A model of ours says so in its own config.
    layout: how the layers are to lie over depth (see `models.layout`), by default as they were
    saved; memory holds no more than one weight of all layers twice. Weights go where the ambient
    mesh says, else to the first device.

    Raises ModelError where the folder is no model, CheckpointError where it is damaged; a damaged
    checkpoint with a good one before it is passed over with a warning.
    """
    path = home(path)
    if pretrained.is_published(path):
        return pretrained.load(path, max_length=max_length, layout=layout)
    _refuse(path, max_length)
    if (path / "checkpoints").is_dir():
        config = _config(path)
        wanted = config if layout is None else layout(config)
        step = _newest(path / "checkpoints", on_warning)
        _same_model(path, step, config)
        return _lying(_read_step(step, config.skeleton()), config, wanted)
    _see(path)
    artifacts.refuse_pickles(path)
    if not (path / WEIGHTS).is_file():
        raise ModelError(
            f"{path} has no {WEIGHTS} and no checkpoints: train or save a model first."
        )
    artifacts.verify(path)
    config = _config(path)
    wanted = config if layout is None else layout(config)
    return _lying(_weights(path / WEIGHTS, config.skeleton()), config, wanted)


def _lying(arrays: dict[str, jax.Array], config: lm.Config, wanted: lm.Config) -> lm.LM:
    """The model of these arrays, which lie as in `config`, as in `wanted`."""
    model = bind(config.skeleton(), arrays)
    if wanted == config:
        return model
    del model
    return bind(wanted.skeleton(), restacked(arrays, config, wanted))


def load_config(path: str | os.PathLike, *, max_length: int | None = None) -> lm.Config:
    """The config of the model that `load` reads from a folder; none of its weights is read."""
    path = home(path)
    if pretrained.is_published(path):
        return pretrained.described(path, max_length)[1]
    _refuse(path, max_length)
    return _config(path)


def load_tokenizer(path: str | os.PathLike, model: lm.LM | None = None) -> Tokenizer:
    """The tokenizer that a saved model or a run was trained with, or of a published folder.

    Raises ModelError where there is none, it cannot be read, or it has ids that `model` lacks.
    """
    path = home(path)
    tokenizer = _tokenizer(path)
    if model is not None and tokenizer.vocab > model.config.vocab:
        raise ModelError(
            f"The tokenizer of {path} has {tokenizer.vocab} ids but its model's vocabulary is "
            f"{model.config.vocab}: use the tokenizer that the model was trained with."
        )
    return tokenizer


def _tokenizer(path: pathlib.Path) -> Tokenizer:
    spec = path if pretrained.is_published(path) else tokenizer_of(path)
    if spec is None:
        raise ModelError(f"{path} was saved without a tokenizer: save it again with one.")
    return tokenizers.load_tokenizer(str(spec))


def tokenizer_of(path: pathlib.Path) -> str | pathlib.Path | None:
    """What `save` takes as the tokenizer of a model in a folder: the folder, if it has its own."""
    path = home(path)
    if (path / TOKENIZER).is_file():
        return path
    return None if pretrained.is_published(path) else _fields(path).get("tokenizer", "bytes")


def fingerprint(model: lm.LM) -> str:
    """sha256 over the config and every weight: what ties a saved session to its model."""
    digest = hashlib.sha256(json.dumps(settings.plain(model.config), sort_keys=True).encode())
    for name, array in sorted(parameters(model).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _refuse(path: pathlib.Path, max_length: int | None) -> None:
    if max_length is not None:
        raise ModelError(f"{path} is no published model: its own config has the max_length.")


def home(path: str | os.PathLike) -> pathlib.Path:
    """The folder that holds config.json: this one, or its `model/`."""
    path = pathlib.Path(path)
    inner = path / INNER
    return inner if inner.is_dir() and not (path / "config.json").exists() else path


def _see(path: pathlib.Path) -> None:
    if not path.exists():
        raise ModelError(f"There is no model at {path}: give a run folder or a saved model.")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give a run folder or a saved model.")


def _fields(path: pathlib.Path) -> dict:
    _see(path)
    try:
        fields = json.loads((path / "config.json").read_text("utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read ({error.strerror}): mend its permissions."
        ) from error
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path / 'config.json'} is not JSON: restore the file.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or "model" not in fields:
        raise ModelError(
            f"{path / 'config.json'} is of no model that this seqlab knows: update it."
        )
    return fields


def _config(path: pathlib.Path) -> lm.Config:
    return settings.read(lm.Config, _fields(path)["model"], where=str(path / "config.json"))


def _replaceable(path: pathlib.Path) -> bool:
    """Whether the path is free, or a saved model with nothing beside it that would be lost."""
    if not path.is_dir():
        return not path.exists()
    names = {inner.name for inner in path.iterdir()}
    return not names or WEIGHTS in names <= {"config.json", WEIGHTS, MANIFEST, *TOKENIZER_FILES}


def _write(
    folder: pathlib.Path,
    model: lm.LM,
    params: Mapping[str, jax.Array],
    tokenizer: str | os.PathLike | None,
) -> None:
    if tokenizer is not None and tokenizer != "bytes":
        source = pathlib.Path(tokenizer)
        file = source / TOKENIZER if source.is_dir() else source
        if not file.is_file():
            raise ModelError(f"There is no tokenizer at {file}: give 'bytes' or its path.")
        published_tokenizer.copy(source, folder)
        shutil.copyfile(file, folder / TOKENIZER)
        tokenizer = TOKENIZER
    config = {"format": FORMAT, "model": settings.plain(model.config), "tokenizer": tokenizer}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    safetensors.flax.save_file(dict(params), folder / WEIGHTS, {"format": "seqlab"})


def _newest(folder: pathlib.Path, on_warning: Callable[[str], object]) -> pathlib.Path:
    """The newest good step; what is damaged is left where it is, for the run to deal with."""
    faults = []
    for number in reversed(steps(folder)):
        try:
            artifacts.verify(folder / str(number))
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            on_warning(f"A damaged checkpoint was passed over: {fault}")
        return folder / str(number)
    if not faults and any(folder.glob("*.damaged*")):
        faults = [
            f"Every checkpoint in {folder} was damaged and set aside: restore one from a copy."
        ]
    raise CheckpointError(faults[0] if faults else f"{folder} holds no checkpoint: train first.")


def _same_model(path: pathlib.Path, step: pathlib.Path, config: lm.Config) -> None:
    """The config beside the checkpoints has no hash; the one that was saved with a step has."""
    saved = read_contents(step)["metadata"].get("model")
    if saved is not None and settings.read(lm.Config, saved, where=str(step)) != config:
        raise CheckpointError(
            f"{path / 'config.json'} is not of the model in {step}: restore the file from a copy."
        )


def _read_step(step: pathlib.Path, skeleton: lm.LM) -> dict[str, jax.Array]:
    mesh, named = jax.sharding.get_mesh(), axes(skeleton)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda name, a: here if mesh.empty else weight_sharding(a.shape, named[name], mesh)
    like = {
        f"{PARAMS}{name}": jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(name, a))
        for name, a in parameters(skeleton).items()
    }
    arrays = read_arrays(step, like, only=PARAMS.rstrip("/"))
    return {name.removeprefix(PARAMS): array for name, array in arrays.items()}


def _weights(path: pathlib.Path, skeleton: lm.LM) -> dict[str, jax.Array]:
    """The arrays of a file as they are stored, float32 or narrower; `bind` compares the names."""
    like, named = parameters(skeleton), axes(skeleton)
    try:
        arrays = trits.restored(dict(tensors.mapped(path)), like, path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not readable ({error}): restore the file.") from None
    for name in largest_first({name: like[name] for name in arrays.keys() & like.keys()}):
        array, wanted = arrays[name], like[name]
        kind = jnp.floating if jnp.issubdtype(wanted.dtype, jnp.floating) else wanted.dtype
        if array.shape != wanted.shape or not jnp.issubdtype(array.dtype, kind):
            raise ModelError(
                f"{path}: {name} is {array.dtype}{list(array.shape)} and "
                f"{wanted.dtype}{list(wanted.shape)} in its config: they are of two models."
            )
        own = tensors.own([array], array.dtype)[0, ...]  # the file may change under a mapped one
        arrays[name] = placed(jax.device_put(own), named[name])
    return arrays
