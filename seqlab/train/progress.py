"""What a person sees while a model trains: a live bar on a terminal, else now and then a line."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from seqlab.train import readable

LINES = 50  # plain lines of a whole run, at least
SECONDS = 10.0  # between plain lines, at most
WINDOW = 100  # steps over which speed and data wait are averaged
DECAY = 0.9  # of the moving averages of the loss


class Progress:
    """The progress of a run from `start_step` to `total_steps`; also a context manager. A `name`
    says which run it is.

    On an interactive terminal two live lines, elsewhere plain lines without control codes. It
    never raises for a terminal or pipe that went away: it falls silent.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        *,
        name: str = "",
        now: Callable[[], float] = time.monotonic,
    ):
        self._name = f"{name}  " if name else ""
        self.total_steps, self.step = total_steps, start_step
        self._console = console or Console(highlight=False)
        self._now, self._began = now, now()
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._loss, self._bits = _Average(), _Average()
        self._held_out: float | None = None
        self._said_step, self._said_at = start_step, -math.inf
        self._live: Live | None = None
        if self._console.is_interactive:
            live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            with _unheard():
                live.start(refresh=True)
            self._live = live
        elif start_step < total_steps:
            self._say(f"{self._name}compiling ...")

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics (see `metrics`): a training step's, or an evaluation's."""
        if "held_out_bits_per_byte" in row:
            self._held_out = row["held_out_bits_per_byte"]
            loss = _number(row.get("held_out_loss"), ".4f")
            bits = _number(self._held_out, ".4f")
            self.note(f"step {row['step']:,}: held-out loss {loss}, {bits} bits/byte")
        if "loss" in row:
            self.step = row["step"]
            self._rows.append(row)
            self._loss.add(row["loss"])
            if "bits_per_byte" in row:
                self._bits.add(row["bits_per_byte"])
            if self._live is None and self._due():
                self._said_step, self._said_at = self.step, self._now()
                self._say(self._line())

    def note(self, text: str) -> None:
        """Print a line of its own: above the bar where there is one."""
        self._say(text)

    def close(self) -> None:
        """Leave the last state standing and give the terminal back. May be called twice."""
        if self._live is not None:
            with _unheard():
                self._live.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, text: str) -> None:
        with _unheard():
            self._console.print(Text(text), soft_wrap=True)

    def _due(self) -> bool:
        steps = self.step - self._said_step
        late = self._now() - self._said_at >= SECONDS
        return late or steps >= max(1, self.total_steps // LINES) or self.step >= self.total_steps

    def _speed(self) -> float | None:
        """Median tokens per second of the last steps: compilation in one of them does not count."""
        speeds = _values(self._rows, "tokens_per_second")
        return statistics.median(speeds) if speeds else None

    def _left(self) -> float | None:
        """Seconds to go at the pace of the last steps, evaluations and checkpoints included."""
        if len(self._rows) < 2:
            return None
        first, last = self._rows[0], self._rows[-1]
        pace = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
        return pace * (self.total_steps - self.step)

    def _line(self) -> str:
        left, elapsed = self._left(), self._now() - self._began
        parts = [
            f"{self._name}step {self.step:,}/{self.total_steps:,}",
            *(f"{name} {value}".strip() for name, value in self._figures()),
            f"ETA {'-' if left is None else readable.clock(left)}",
            f"elapsed {readable.clock(elapsed)}",
        ]
        return "  ".join(parts)

    def _figures(self) -> list[tuple[str, str]]:
        speed, waits = self._speed(), _values(self._rows, "data_wait")
        figures = [
            ("loss", _number(self._loss.value, ".4f")),
            *([("bits/byte", _number(self._bits.value, ".3f"))] if self._bits.fed else []),
            ("", f"{'-' if speed is None else readable.count(speed)} tokens/s"),
            ("data wait", _number(sum(waits) / len(waits) if waits else None, ".0%")),
        ]
        if self._held_out is not None:
            figures.append(("held-out", _number(self._held_out, ".3f")))
        return figures

    def _render(self) -> RenderableType:
        waiting = not self._rows and self.step < self.total_steps
        elapsed, left = self._now() - self._began, self._left()
        total = f"{self.total_steps:,}"
        bar = ProgressBar(
            total=max(1, self.total_steps),
            completed=self.step,
            pulse=waiting,
            complete_style="cyan",
            finished_style="green",
        )
        top = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for ratio in (None, 1, None, None, None):
            top.add_column(ratio=ratio, no_wrap=True)
        top.add_row(
            Text(f"{self._name}step {self.step:>{len(total)},}/{total}", "bold"),
            bar,
            f"{self.step / max(1, self.total_steps):4.0%}",
            _pair("elapsed", readable.clock(elapsed)),
            _pair("ETA", "-:--" if left is None else readable.clock(left)),
        )
        return Group(top, self._compiling() if waiting else self._numbers())

    def _compiling(self) -> Text:
        dots = "..." if self._console.options.ascii_only else "…"
        return Text(f"compiling{dots}", "yellow")

    def _numbers(self) -> Text:
        return Text("   ").join(_pair(name, value) for name, value in self._figures())


class _Average:
    """An exponential moving average without the bias of its start; shows a NaN while it lasts."""

    def __init__(self):
        self._sum = self._weight = 0.0
        self._lost = False

    def add(self, value: float | None) -> None:
        self._lost = value is None or not math.isfinite(value)
        if value is not None and not self._lost:
            self._sum = DECAY * self._sum + (1 - DECAY) * value
            self._weight = DECAY * self._weight + (1 - DECAY)

    @property
    def fed(self) -> bool:
        return self._lost or self._weight > 0

    @property
    def value(self) -> float | None:
        return None if self._lost or not self._weight else self._sum / self._weight


def _values(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None or not math.isfinite(value) else format(value, form)


def _pair(name: str, value: str) -> Text:
    bad = "bold red" if value == "nan" else ""
    return Text.assemble((f"{name} " if name else "", "dim"), (value, bad))


def _unheard() -> contextlib.AbstractContextManager:
    """Nobody listens any more; rich itself asks to exit when the reader of a pipe is gone."""
    return contextlib.suppress(OSError, SystemExit)
