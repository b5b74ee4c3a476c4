"""What a linearization reads: the files that a command line names, and what of them is held out."""

import dataclasses
import pathlib
from collections.abc import Sequence

from seqlab.errors import DataError
from seqlab.models.tokenizer import Tokenizer
from seqlab.train.corpus import open_corpus
from seqlab.train.sources import Documents, Jsonl, Source, Text, Tokens

HELD_OUT = 0.05  # share of the documents, where none are named
LINES = (".jsonl", ".ndjson")


def named(words: Sequence[str], field: str = "text") -> tuple[Source, ...]:
    """Sources of the files, patterns, folders and URLs that words name.

    What ends in .jsonl is JSON lines, of each of which `field` is a document; a folder or a URL is
    token shards; all else is text, a document a file.
    """
    lines = tuple(word for word in words if word.endswith(LINES))
    shards = tuple(word for word in words if word not in lines and _is_place(word))
    files = tuple(word for word in words if word not in (*lines, *shards))
    texts = [Text(files)] if files else []
    return (*texts, *([Jsonl(lines, field)] if lines else []), *map(Tokens, shards))


def _is_place(word: str) -> bool:
    return "://" in word or pathlib.Path(word).expanduser().is_dir()


def split(
    sources: Sequence[Source], share: float = HELD_OUT
) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """The same documents for training, and for evaluation the `share` of them that their names (or
    lines) decide.

    Raises DataError where a source is token shards, which are not split, or one side is empty.
    """
    train, held_out = [], []
    for source in sources:
        if isinstance(source, Tokens):
            raise DataError(
                f"Token shards such as {source.path!r} are not split: name others with --held-out."
            )
        any(Documents(source))  # what is missing or unreadable says so itself
        for part, kept in (("train", train), ("held_out", held_out)):
            kept.append(dataclasses.replace(source, held_out=share, part=part))
    if not any(map(_holds_any, held_out)) or not all(map(_holds_any, train)):
        raise DataError(
            f"A share of {share:g} of the documents leaves none to train on or none to evaluate "
            "with: name the latter with --held-out FILES, or give another --share."
        )
    return tuple(train), tuple(source for source in held_out if _holds_any(source))


def _holds_any(source: Text | Jsonl) -> bool:
    try:
        return any(Documents(source))
    except DataError:
        return False


def tokens(sources: Sequence[Source], tokenizer: Tokenizer) -> int:
    """How many tokens they hold; raises DataError for what cannot be read."""
    return sum(open_corpus(source, tokenizer).tokens for source in sources)
