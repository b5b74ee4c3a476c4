"""Text once into token shards, so that long runs and many machines need not do it again."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from seqlab.errors import DataError
from seqlab.models.tokenizer import load_tokenizer
from seqlab.train.shards import Writer
from seqlab.train.sources import Documents, Jsonl, Part, Text


class Tokenized(NamedTuple):
    """What was written so far: `tokens` counts document marks, `bytes` is UTF-8 text alone."""

    documents: int
    tokens: int
    bytes: int
    notes: tuple[str, ...] = ()  # what was skipped, a sentence each


def tokenize(
    files: Sequence[str],
    out: str,
    tokenizer: str = "bytes",
    *,
    field: str | None = None,
    held_out: float = 0.0,
    part: Part = "all",
    on_progress: Callable[[Tokenized], None] | None = None,
) -> Tokenized:
    """Write the documents of `files` as token shards to the folder or URL `out`.

    field: the files are JSON lines with their text in this field. held_out, part: as in `Text`.
    on_progress is called about once a million characters. Memory does not grow with the text
    but for 8 bytes a document. If it fails, `out` is left unfinished, which every reader
    refuses and another run replaces.
    Raises DataError where a file is unfit or `out` is not empty; ModelError for the tokenizer.
    """
    ids = load_tokenizer(tokenizer)
    kind = Text if field is None else lambda *a: Jsonl(a[0], field, *a[1:])
    documents = Documents(kind(tuple(files), held_out, part))
    groups = documents.groups()
    first = next(groups)  # missing files are refused before anything is written
    writer = Writer(out, tokenizer=ids.fingerprint, vocab=ids.vocab)
    for texts in itertools.chain([first], groups):
        for text, tokens in zip(texts, ids.documents(texts), strict=True):
            writer.add(tokens, len(text.encode()))
        if on_progress:
            on_progress(Tokenized(writer.documents, writer.tokens, writer.bytes))
    if not writer.tokens:
        raise DataError(f"The tokenizer {tokenizer!r} makes no token of this text: give another.")
    done = writer.finish()
    return Tokenized(done.documents, done.tokens, done.bytes, tuple(documents.notes()))
