"""Models written as their families publish them, for transformers and all that reads its files."""

import contextlib
import json
import os
import pathlib
import shutil
from types import ModuleType
from typing import Any

import numpy as np

from seqlab.errors import ModelError, SeqlabError
from seqlab.models import decoder, hf_config, lm, published_tokenizer, tensors, translate
from seqlab.models.essence import essence
from seqlab.models.families import linearized
from seqlab.models.parameters import parameters
from seqlab.models.pretrained import config_of, family_of, model_types


def export_hf(
    model: lm.LM, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None
) -> pathlib.Path:
    """Write a model as a published folder, which `transformers` reads; whole or not at all.

    It is of the family that it was read from, or else of the first that can express it.
    tokenizer: a folder whose tokenizer files are copied. Raises ModelError where no family can
    express the model, or the path is taken or cannot be written.
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
    if model.config.published is not None:
        raw = linearized.described(model.config) or json.loads(model.config.published)
        family = family_of(raw.get("model_type"), "The model")
        theirs = _expressed(model, family, raw, model.config)
        if theirs is None:
            raise ModelError(
                "The model's config was changed since it was read from a published checkpoint, "
                "which its family cannot express: save it with seqlab.save."
            )
        return _with_dtype(raw, model), theirs
    for family in dict.fromkeys(model_types().values()):
        described = family.describe(model.config) if hasattr(family, "describe") else None
        with contextlib.suppress(SeqlabError):  # what is no such model may fail anywhere
            theirs = described and _expressed(model, family, *described)
            if described and theirs:
                return _with_dtype(described[0], model), theirs
    raise ModelError(
        "No published family can express this model: save it with seqlab.save, or build it as one "
        "of them is built (docs/checkpoints.md)."
    )


def fields_of(config: lm.Config) -> dict[str, Any] | None:
    """The config.json of a model, where its config alone tells it: what it was read from, or what a
    family says of such a model."""
    if config.published is not None:
        return json.loads(config.published)
    for family in dict.fromkeys(model_types().values()):
        described = family.describe(config) if hasattr(family, "describe") else None
        with contextlib.suppress(SeqlabError):
            if described is not None:
                raw, written = described
                again = config_of(family, hf_config.normalised(raw), decoder.UNREAD, "The model")
                if essence(again) == essence(written):
                    return raw
    return None


def _expressed(
    model: lm.LM, family: ModuleType, raw: dict[str, Any], config: lm.Config
) -> dict[str, np.ndarray] | None:
    """The tensors of a model that `raw` describes; None where it does not describe `config`.

    Raises Drifted, for there the config is not what stands in the way.
    """
    theirs = translate.exported(family.rules(model.config), parameters(model))
    again = config_of(family, hf_config.normalised(raw), theirs, "The model")
    return theirs if essence(again) == essence(config) else None


def _with_dtype(raw: dict[str, Any], model: lm.LM) -> dict[str, Any]:
    """config.json with the dtype of the matrices."""
    kept = {name: value for name, value in raw.items() if name != "torch_dtype"}
    return kept | {"dtype": str(model.embed.weight.dtype)}
