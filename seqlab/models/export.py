"""Models written as their families publish them, for transformers and all that reads its files."""

import contextlib
import json
import os
import pathlib
import shutil
from types import ModuleType
from typing import Any

import numpy as np

from seqlab import settings
from seqlab.errors import ModelError, SeqlabError
from seqlab.models import decoder, hf_config, lm, published_tokenizer, tensors, translate
from seqlab.models.parameters import parameters
from seqlab.models.pretrained import config_of, family_of, model_types

#: Fields of configs that say how a model runs rather than what it computes.
RUNNING = {"max_length", "implementation", "chunk_size", "dtype", "remat", "published"}
#: Fields of a model's config that its blocks, one by one, say as well.
FOLDED = {"before", "pattern", "repeats", "after", "ffn", "join"}


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
        raw = json.loads(model.config.published)
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


def _expressed(
    model: lm.LM, family: ModuleType, raw: dict[str, Any], config: lm.Config
) -> dict[str, np.ndarray] | None:
    """The tensors of a model that `raw` describes; None where it does not describe `config`.

    Raises Drifted, for there the config is not what stands in the way.
    """
    theirs = translate.exported(family.rules(model.config), parameters(model))
    again = config_of(family, hf_config.normalised(raw), theirs, "The model")
    return theirs if _essence(again) == _essence(config) else None


def _essence(config: lm.Config) -> Any:
    """What a model computes, layer by layer, however its config says it."""
    blocks = [settings.plain(block) for _, _, block in decoder.places(config)]
    rest = {name: value for name, value in settings.plain(config).items() if name not in FOLDED}
    return _without_running([rest, blocks])


def _without_running(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {n: _without_running(value) for n, value in plain.items() if n not in RUNNING}
    return [_without_running(value) for value in plain] if isinstance(plain, list) else plain


def _with_dtype(raw: dict[str, Any], model: lm.LM) -> dict[str, Any]:
    """config.json with the dtype of the matrices."""
    kept = {name: value for name, value in raw.items() if name != "torch_dtype"}
    return kept | {"dtype": str(model.embed.weight.dtype)}
