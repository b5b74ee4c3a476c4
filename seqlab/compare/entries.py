"""What is compared: mixers with fields of their own, each in the model that a protocol asks for."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from seqlab.compare import published
from seqlab.conformance.suite import load_mixer
from seqlab.errors import ConfigError
from seqlab.layers import ffn, registry
from seqlab.models import lm
from seqlab.tasks import Protocol

_OPEN, _CLOSE = "([{", ")]}"


class Entry(NamedTuple):
    """`label` is the text that asked for it, `name` is with the width where there are several."""

    label: str
    name: str
    model: lm.Config


def parse(text: str, protocol: Protocol, widths: Sequence[int] = ()) -> tuple[Entry, ...]:
    """The entries of "a,b(heads=2),c(d_state=8,norm=null)", or of "all", at each of the widths, by
    default the protocol's first.

    Between parentheses stand overrides as on the command line of `check`. Raises ConfigError for
    whatever cannot be built.
    """
    entries = tuple(
        Entry(label, named(label, width, len(widths) > 1), model(mixer, protocol, width))
        for label, mixer in mixers(text, protocol.length)
        for width in widths or protocol.widths[:1]
    )
    for entry in entries:
        entry.model.skeleton()  # what does not fit is said before anything trains
    return entries


def mixers(text: str, length: int) -> list[tuple[str, Any]]:
    """The mixers of such a text by their labels; a state that grows with a `max_length` that is not
    given holds `length` tokens."""
    labels = registry.own_mixers() if text.strip() == "all" else list(_cut(text))
    if not labels or len(set(labels)) < len(labels):
        raise ConfigError(f"--mixers {text!r}: name one or more mixers, each once: a,b(heads=2).")
    return [(label, _mixer(label, length)) for label in labels]


def named(label: str, width: int, several: bool) -> str:
    return f"{label} @ {width}" if several else label


def model(mixer: Any, protocol: Protocol, width: int) -> lm.Config:
    """The model with this mixer that the protocol compares."""
    first = (registry.from_plain(published.FIRST),) if protocol.conv_first else ()
    return lm.Config(
        vocab=protocol.vocab,
        d_model=width,
        before=first,
        pattern=(mixer,),
        repeats=protocol.layers - len(first),
        remat="none",
        ffn=ffn.Config() if protocol.ffn else None,
    )


def _mixer(label: str, length: int) -> Any:
    name, _, rest = label.partition("(")
    if rest and not rest.endswith(")"):
        raise ConfigError(f"The mixer {label!r} is not of the form name(field=value, ...).")
    fields = [field.strip() for field in _cut(rest.removesuffix(")"))]
    config = load_mixer(name.strip(), fields)
    limit = "max_length"  # a state that grows with it is to hold what is tested, and no more
    if hasattr(config, limit) and not any(field.startswith(limit) for field in fields):
        return dataclasses.replace(config, **{limit: length})
    return config


def _cut(text: str) -> Iterator[str]:
    """The parts between the commas that stand in no bracket."""
    depth, start = 0, 0
    for at, char in enumerate(text + ","):
        depth += (char in _OPEN) - (char in _CLOSE)
        if char == "," and (depth == 0 or at == len(text)):
            if part := text[start:at].strip():
                yield part
            start = at + 1
