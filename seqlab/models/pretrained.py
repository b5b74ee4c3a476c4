"""Published checkpoints: a folder with config.json and safetensors becomes an LM, and back.

What is read is data alone. Every tensor must be understood: one that is missing or left over is an
error. Files are mapped and each device reads its slice, one weight at a time.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
import shutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from seqlab import settings
from seqlab.errors import ModelError, SeqlabError
from seqlab.models import decoder, hf_config, lm, published_tokenizer, tensors, translate
from seqlab.models import families as package
from seqlab.models.parameters import bind, parameters

#: Prefixes of the text model in multimodal files, and what they are in a text model's own.
WRAPPED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)

#: Fields of configs that say how a model runs rather than what it computes.
RUNNING = {"max_length", "implementation", "chunk_size", "dtype", "remat", "published"}


def is_published(path: pathlib.Path) -> bool:
    """Whether a folder is a published checkpoint rather than a model or run of ours."""
    try:
        fields = json.loads((path / hf_config.CONFIG).read_text("utf-8"))
        return "format" not in fields and ("model_type" in fields or "text_config" in fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def model_types() -> dict[str, ModuleType]:
    """Every `model_type` that can be read, and the file that serves it."""
    names = (f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(name) for name in names]
    return {kind: module for module in modules for kind in module.MODEL_TYPES}


def load(path: str | os.PathLike, *, max_length: int | None = None) -> lm.LM:
    """The model in a published folder.

    Matrices keep the dtype they are stored in; norms, biases and the like become float32, which
    changes no value. Weights go where the ambient mesh says, else to the first device.
    max_length: tokens of a document that full attention holds; by default what the model was
    trained for, but 4096 at most. Raises ModelError or CheckpointError.
    """
    path = pathlib.Path(path)
    fields, raw = hf_config.read(path)
    fields.max_length = max_length
    family = _family(fields.get("model_type"), path)
    held = _untied(_unwrapped(tensors.read(path)), fields, family, path)
    config = _config(family, fields, held, path)
    config = dataclasses.replace(config, published=json.dumps(raw))
    skeleton = config.skeleton()
    ignored = getattr(family, "IGNORED", ())
    return bind(skeleton, translate.imported(path, skeleton, family.rules(config), held, ignored))


def export_hf(
    model: lm.LM, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None
) -> pathlib.Path:
    """Write a model that came from a published checkpoint as such a folder, which `transformers`
    reads; whole or not at all.

    tokenizer: a folder whose tokenizer files are copied. Raises ModelError where the model is of
    no published family, or the path is taken or cannot be written.
    """
    path = pathlib.Path(path).resolve()
    if path.exists():
        raise ModelError(f"{path} exists: choose another path for the exported model.")
    raw, theirs = published(model)
    aside = path.with_name(f".{path.name}.exporting-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        (aside / hf_config.CONFIG).write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
        tensors.write(aside, theirs)
        if tokenizer is not None:
            published_tokenizer.copy(pathlib.Path(tokenizer), aside)
        aside.rename(path)
    except OSError as error:
        raise ModelError(
            f"The model cannot be exported as {path} ({error.strerror}): free space, or choose a "
            "folder you can write."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def published(model: lm.LM) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config.json and the tensors of a model, as its family publishes them."""
    if model.config.published is None:
        raise ModelError(
            "This model was not read from a published checkpoint, so there is no family to export "
            "it as: save it with seqlab.save."
        )
    raw = json.loads(model.config.published)
    family = _family(raw.get("model_type"), pathlib.Path("The model"))
    theirs = translate.exported(family.rules(model.config), parameters(model))
    again = _config(family, hf_config.normalised(raw), theirs, pathlib.Path("The model"))
    if _essence(settings.plain(again)) != _essence(settings.plain(model.config)):
        raise ModelError(
            "The model's config was changed since it was read from a published checkpoint, which "
            "its family cannot express: save it with seqlab.save."
        )
    return raw | {"dtype": str(model.embed.weight.dtype)}, theirs


def _essence(plain: Any) -> Any:
    """A plain config without what changes how a model runs, not what it computes."""
    if isinstance(plain, dict):
        return {n: _essence(value) for n, value in plain.items() if n not in RUNNING}
    return [_essence(value) for value in plain] if isinstance(plain, list) else plain


def _family(kind: Any, path: pathlib.Path) -> ModuleType:
    known = model_types()
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(
            f"{path}: no model of type {kind!r} can be read; known types are "
            f"{', '.join(sorted(known))}."
        )
    return known[kind]


def _unwrapped(held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by the names they have in a model of text alone."""

    def plain(name: str) -> str:
        for wrapped, own in WRAPPED:
            if name.startswith(wrapped):
                return own + name.removeprefix(wrapped)
        return name

    return {plain(name): array for name, array in held.items()}


def _config(family: ModuleType, fields, held, path: pathlib.Path) -> lm.Config:
    """What the family makes of the fields; whatever else may stand in them ends as a sentence."""
    try:
        config = family.config(fields, held)
        config.skeleton()
        return config
    except SeqlabError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path / hf_config.CONFIG} does not describe a model of type "
            f"{fields['model_type']!r} ({settings.raised(error)}): restore the file."
        ) from None


def _untied(held: dict[str, np.ndarray], fields, family, path) -> dict[str, np.ndarray]:
    """Without a head that only repeats the embedding, which some files with tied weights hold."""
    embed, head = getattr(family, "TIED", (decoder.EMBED, decoder.HEAD))
    if not fields.get("tie_word_embeddings") or head not in held or embed not in held:
        return held
    if not np.array_equal(held[embed], held[head]):
        raise ModelError(
            f"{path}: config.json ties {head} to the embedding, and the file has another: "
            "set tie_word_embeddings to false if that is what was trained."
        )
    return {name: array for name, array in held.items() if name != head}
