"""Between a published folder and a saved model: one becomes the other, tokenizer and all."""

import pathlib

from seqlab.errors import ModelError
from seqlab.models import export, pretrained, published_tokenizer, store


def convert(source: pathlib.Path, target: pathlib.Path, *, max_length: int | None = None) -> str:
    """Write a published folder as a saved model, or a saved model or run as a published folder.

    Returns a sentence that says what was written. Raises what `load`, `save` and `export_hf` do,
    and ModelError where the target exists.
    """
    if target.exists():
        raise ModelError(f"{target} exists: choose another path for the converted model.")
    model = store.load(source, max_length=max_length)
    has_tokenizer = (source / published_tokenizer.TOKENIZER).is_file()
    tokenizer = source if has_tokenizer else None
    if pretrained.is_published(source):
        store.save(model, target, tokenizer=tokenizer)
        return f"{target} is a saved model, for seqlab.load and every command."
    export.export_hf(model, target, tokenizer=tokenizer)
    return f"{target} is a published model, for transformers and all that reads its files."
