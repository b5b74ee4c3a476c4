"""What can go wrong through no fault of the code: each says what, where, and what to do about it.

Every message is one sentence a user can act on. The command line prints it and exits with `code`;
it never prints a traceback for one of these.
"""

import difflib
from collections.abc import Iterable


class SeqlabError(Exception):
    """Base of every error that seqlab raises about its input; `code` is the exit status."""

    code = 2


class ConfigError(SeqlabError):
    """A config file, an override or a field of a config is wrong."""


class DataError(SeqlabError):
    """Training or prompt data is missing, empty, unreadable or does not fit the model."""


class ModelError(SeqlabError):
    """A model, tokenizer or saved session does not fit what it is used with."""


class CheckpointError(SeqlabError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    code = 74


class NumericalError(SeqlabError):
    """Training has left the finite numbers; starting it again as it is will not help."""

    code = 77


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the closest known name, else the whole list; ends a sentence."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known names are {', '.join(known)}."
