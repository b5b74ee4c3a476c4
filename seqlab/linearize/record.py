"""linearize.json: what was asked of a folder, and every figure from the moment it is measured."""

import json
import math
import pathlib
from collections.abc import Callable

from pydantic.dataclasses import dataclass

from seqlab import settings
from seqlab.errors import CheckpointError, ConfigError
from seqlab.linearize.estimate import Estimate
from seqlab.linearize.request import MAY_CHANGE, Request
from seqlab.settings import STRICT
from seqlab.train.folder import difference, put
from seqlab.train.lock import FILE as LOCK

FILE = "linearize.json"
TEACHER, BASELINE, SWAP = "teacher", "baseline", "swap"  # what is measured beside the stages
FORMAT = 1


@dataclass(frozen=True, config=STRICT)
class Figures:
    """What was measured of one model.

    loss      nats per token of the held-out text
    transfer  of every replaced layer, the mean square of what its output differs from the teacher's
              over that of the teacher's
    recall    share of the values recalled, by the distance in tokens; None where a document of that
              length is more than the model holds
    tokens    that it was trained on since the swap
    """

    loss: float
    transfer: dict[int, float]
    recall: dict[int, float | None]
    tokens: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class Record:
    """The file of one folder, written anew at every figure."""

    def __init__(self, folder: pathlib.Path, request: Request):
        """Raises ConfigError where the folder holds something else, or the figures of another
        request, whose first field that differs is named."""
        self.folder, self.request = folder, request
        self.figures: dict[str, Figures] = {}
        self.estimate: Estimate | None = None
        self.finished = False
        if (folder / FILE).exists():
            self._read()
        elif folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder: choose another path (--out).")
        elif folder.exists() and self._foreign():
            raise ConfigError(
                f"{folder} is not empty and holds no linearization: choose another folder (--out)."
            )

    def figure(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """What was measured under this name, or is now; it is kept before this returns."""
        if name not in self.figures:
            self.figures[name] = measure()
            self.write()
        return self.figures[name]

    def write(self) -> None:
        fields = {
            "format": FORMAT,
            "asked": settings.plain(self.request),
            "estimate": self.estimate and settings.plain(self.estimate),
            "figures": {name: settings.plain(f) for name, f in self.figures.items()},
            "finished": self.finished,
        }
        put(self.folder / FILE, json.dumps(fields, indent=1, allow_nan=False) + "\n")

    def _foreign(self) -> bool:
        return any(not f.name.startswith((LOCK, FILE)) for f in self.folder.iterdir())

    def _read(self) -> None:
        path = self.folder / FILE
        try:
            held = json.loads(path.read_text("utf-8"))
            then, known = held["asked"], held["format"] == FORMAT
            figures = held["figures"].items()
            self.figures = {name: settings.read(Figures, f, FILE) for name, f in figures}
            self.estimate = held["estimate"] and settings.read(Estimate, held["estimate"], FILE)
            self.finished = held["finished"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
            known = False
        if not known:
            raise CheckpointError(
                f"{path} is damaged or of another version of seqlab: restore it, or give another "
                "--out."
            )
        same = dict.fromkeys(MAY_CHANGE)
        different = difference(then | same, settings.plain(self.request) | same)
        if different:
            name, was, now = different
            raise ConfigError(
                f"{self.folder} holds a linearization that differs in {name} (was {was}, is "
                f"{now}): give another --out, or remove that one."
            )
