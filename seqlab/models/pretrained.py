"""Published checkpoints: a folder with config.json and safetensors becomes an LM.

What is read is data alone. Every tensor must be understood: one that is missing or left over is an
error. Files are mapped and each device reads its slice, one weight at a time.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from seqlab import settings
from seqlab.errors import ModelError, SeqlabError
from seqlab.models import decoder, hf_config, lm, tensors, translate
from seqlab.models import families as package
from seqlab.models.layout import Layout
from seqlab.models.parameters import bind

#: Prefixes of the text model in multimodal files, and what they are in a text model's own.
WRAPPED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


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


def load(
    path: str | os.PathLike, *, max_length: int | None = None, layout: Layout | None = None
) -> lm.LM:
    """The model in a published folder.

    Matrices keep the dtype they are stored in; norms, biases and the like become float32, which
    changes no value. Weights go where the ambient mesh says, else to the first device.
    max_length: tokens of a document that full attention holds; by default what the model was
    trained for, but 4096 at most. layout: how the layers are to lie over depth; by default in as
    few stacks as can be. Raises ModelError or CheckpointError.
    """
    path = pathlib.Path(path)
    family, config, held = described(path, max_length)
    config = config if layout is None else layout(config)
    skeleton = config.skeleton()
    ignored = getattr(family, "IGNORED", ())
    return bind(skeleton, translate.imported(path, skeleton, family.rules(config), held, ignored))


def described(
    path: pathlib.Path, max_length: int | None = None
) -> tuple[ModuleType, lm.Config, dict[str, np.ndarray]]:
    """The family and the config of a published folder, and its tensors, which are mapped: none is
    read yet. Raises as `load` does."""
    fields, raw = hf_config.read(path)
    fields.max_length = max_length
    family = family_of(fields.get("model_type"), path)
    hf_config.refuse_quantized(path, raw, getattr(family, "QUANTIZED", ()))
    held = _untied(read(path, family), fields, family, path)
    config = config_of(family, fields, held, path / hf_config.CONFIG)
    return family, dataclasses.replace(config, published=json.dumps(raw)), held


def read(path: pathlib.Path, family: ModuleType) -> dict[str, np.ndarray]:
    """The tensors of a folder, by the names under which the family publishes them."""
    respelled = getattr(family, "respelled", dict)
    return respelled(_unwrapped(tensors.read(path)))


def family_of(kind: Any, where: object) -> ModuleType:
    """The file that serves a `model_type`; raises ModelError, which begins with `where`."""
    known = model_types()
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(
            f"{where}: no model of type {kind!r} can be read; known types are "
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


def config_of(
    family: ModuleType, fields: hf_config.Fields, held: Mapping[str, np.ndarray], where: object
) -> lm.Config:
    """The model that the family makes of the fields; whatever may stand in them, it ends as a
    sentence, which begins with `where`."""
    try:
        config = family.config(fields, held)
        config.skeleton()
        return config
    except SeqlabError:
        raise
    except Exception as error:
        raise ModelError(
            f"{where} does not describe a model of type "
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
