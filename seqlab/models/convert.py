"""Between a published folder and a saved model: one becomes the other, tokenizer and all. And from
either to one with its weights packed."""

import pathlib
from collections.abc import Sequence

import numpy as np

from seqlab import settings
from seqlab.errors import ConfigError, DataError, ModelError
from seqlab.layers import int8_linear, ptqtp_linear
from seqlab.models import export, lm, pack, pretrained, store
from seqlab.models.parameters import parameters

CHARACTERS = 2**17  # of a calibration text that are read at most
ROW, ROWS, BATCH = 256, 64, 8  # tokens in a row of it, rows at most, and at a time


def convert(source: pathlib.Path, target: pathlib.Path, *, max_length: int | None = None) -> str:
    """Write a published folder as a saved model, or a saved model or run as a published folder.

    Returns a sentence that says what was written. Raises what `load`, `save` and `export_hf` do,
    and ModelError where the target exists.
    """
    _free(target)
    model = store.load(source, max_length=max_length)
    if pretrained.is_published(source):
        store.save(model, target, tokenizer=store.tokenizer_of(source))
        return f"{target} is a saved model, for seqlab.load and every command."
    tokenizer = store.tokenizer_of(source)
    own = tokenizer if isinstance(tokenizer, pathlib.Path) else None
    export.export_hf(model, target, tokenizer=own)
    return f"{target} is a published model, for transformers and all that reads its files."


def packed(
    source: pathlib.Path,
    target: pathlib.Path,
    how: str,
    fields: Sequence[str] = (),
    *,
    calibrate: pathlib.Path | None = None,
    squeeze: bool = False,
    max_length: int | None = None,
) -> str:
    """Write a model of any folder as a saved one with packed weights, tokenizer and all.

    how        ternary, int8 or ptqtp; `fields` override those of its config
    calibrate  a text, for int8
    squeeze    see `store.save`

    Returns a sentence that says what was written. Raises what `load`, `save` and `models.pack` do,
    ConfigError for what does not go together, and ModelError where the target exists.
    """
    _free(target)
    if (how == "int8") != (calibrate is not None):
        raise ConfigError(
            "To pack a model as int8, and only that, takes --calibrate FILE: a text such as it is "
            "to read."
        )
    if how == "int8" and squeeze:
        raise ConfigError("A model packed as int8 has no trits: leave --squeeze.")
    if how == "ternary" and fields:
        raise ConfigError(
            f"What is packed as ternary stays as it was trained: leave {fields[0]!r}."
        )
    model = store.load(source, max_length=max_length)
    if how == "ternary":
        model = pack.ternary(model)
    elif calibrate is None:
        model = pack.ptqtp(model, settings.override(ptqtp_linear.Config(), fields, how))
    else:
        config = settings.override(int8_linear.Config(), fields, how)
        model = pack.int8(model, config, _batches(model, source, calibrate))
    store.save(model, target, tokenizer=store.tokenizer_of(source), squeeze=squeeze)
    ours, in_bfloat16 = pack.projection_bytes(model)
    whole = sum(array.nbytes for array in parameters(model).values())
    return (
        f"{target} is a saved model for inference: the weights of its projections take {ours:,} "
        f"bytes of memory, {in_bfloat16 / ours:.2f} times less than in bfloat16, and all of it "
        f"{whole:,}."
    )


def _free(target: pathlib.Path) -> None:
    if target.exists():
        raise ModelError(f"{target} exists: choose another path for the converted model.")


def _batches(model: lm.LM, source: pathlib.Path, text: pathlib.Path) -> list[np.ndarray]:
    """The beginning of a text in batches of tokens [B, T]."""
    try:
        with text.open(encoding="utf-8") as file:
            begins = file.read(CHARACTERS)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{text} cannot be read ({error}): give a text file.") from error
    if not begins:
        raise DataError(f"{text} is empty: give a text such as the model is to read.")
    ids = store.load_tokenizer(source, model).document(begins)
    T = min(ROW, len(ids), model.max_length or ROW)
    rows = ids[: len(ids) // T * T].reshape(-1, T)[:ROWS]
    B = min(BATCH, len(rows))
    return np.split(rows[: len(rows) // B * B], len(rows) // B)
