"""What is asked of a linearization: of a command line's words a frozen config, which its folder
keeps."""

import dataclasses
import pathlib
from collections.abc import Sequence

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab import settings
from seqlab.errors import ConfigError, nearest
from seqlab.linearize import sources, targets
from seqlab.linearize.recipes import METHODS, Stage
from seqlab.settings import STRICT
from seqlab.train.config import Mesh
from seqlab.train.sources import Source


@dataclass(frozen=True, config=STRICT)
class Request:
    """One linearization.

    teacher   a published folder, a saved model or a run; max_length as `store.load` takes it
    method    its recipe is `stages`; `mixer`, a preset or a mixer by name, replaces attention
    fields    `name=value` of that mixer
    keep      layers, from 0, that stay as they are; every `keep_every`-th does too
    length    tokens of a row in evaluations, of which there are `held_out_rows`
    """

    teacher: str
    method: str
    mixer: str
    train: tuple[Source, ...]
    held_out: tuple[Source, ...]
    fields: tuple[str, ...] = ()
    keep: tuple[NonNegativeInt, ...] = ()
    keep_every: PositiveInt | None = None
    stages: tuple[Stage, ...] = ()
    length: PositiveInt | None = None
    held_out_rows: PositiveInt = 64
    max_length: PositiveInt | None = None
    mesh: Mesh = Mesh()
    seed: NonNegativeInt = 0

    @property
    def runs(self) -> dict[str, Stage]:
        """The stages by the names that their folders and figures have."""
        return {f"{number}-{stage.loss}": stage for number, stage in enumerate(self.stages, 1)}

    def kept(self, layers: int) -> frozenset[int]:
        """The layers, of so many, that stay."""
        every = self.keep_every
        return frozenset(self.keep) | frozenset(range(every - 1, layers, every) if every else ())


#: What may differ when a linearization goes on.
MAY_CHANGE = ("mesh",)


def ask(
    teacher: pathlib.Path,
    method: str,
    data: Sequence[str],
    *,
    mixer: str | None = None,
    held_out: Sequence[str] = (),
    share: float = sources.HELD_OUT,
    field: str = "text",
    keep: str | None = None,
    keep_every: int | None = None,
    max_length: int | None = None,
    overrides: Sequence[str] = (),
) -> Request:
    """The request that a command line makes.

    data, held_out  words as `sources.named` reads them, `field` with them; of data a `share` of the
                    documents is held out where held_out names none
    overrides       `name=value`: fields of the request (stages.0.tokens, mesh.data, length), else
                    of the mixer (window)

    Raises ConfigError or DataError for what is unknown, missing or wrong.
    """
    if method not in METHODS:
        raise ConfigError(f"There is no method {method!r}: {nearest(method, METHODS)}")
    train = sources.named(data, field)
    train, evaluated = (
        (train, sources.named(held_out, field)) if held_out else sources.split(train, share)
    )
    own = {f.name for f in dataclasses.fields(Request)} - {"teacher", "method", "mixer", "fields"}
    ours = [o for o in overrides if o.partition("=")[0].partition(".")[0] in own]
    request = Request(
        teacher=str(teacher.resolve()),
        method=method,
        mixer=targets.known(mixer or METHODS[method].target),
        train=train,
        held_out=evaluated,
        fields=tuple(_assignment(o) for o in overrides if o not in ours),
        keep=_layers(keep),
        keep_every=keep_every,
        stages=METHODS[method].stages,
        max_length=max_length,
    )
    return settings.override(request, ours)


def _assignment(word: str) -> str:
    if "=" not in word:
        raise ConfigError(
            f"{word!r} is not of the form name=value: a file takes an option, such as --data, of "
            "its own, and a pattern stands in quotes."
        )
    return word


def _layers(text: str | None) -> tuple[int, ...]:
    """Layers from "0,5"; none from None."""
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--keep {text!r} is not a list of layers such as 0,5.")
    return tuple(sorted({int(part) for part in parts}))
