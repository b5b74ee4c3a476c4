"""What was measured as PNG files, light and dark."""

import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from seqlab.bench.record import Row, shown
from seqlab.bench.timing import SPREAD
from seqlab.compare import labels
from seqlab.compare.labels import Label
from seqlab.compare.pictures import COLOURS
from seqlab.train import readable
from seqlab.train.charts import DPI, THEMES, Theme, canvas, legend, write

WIDTH = 10.4  # inches, of every picture
HEIGHT = 3.4  # of a panel
LINE = 0.36  # of a row of points
MOST = 4  # panels side by side
NAMES = 0.18  # of the width of a picture, for the names of lines
STATE = "state bytes"

#: Where the axes have marks: at powers of 4, and at 1, 2, 5, 10, 20 ...
BYTES, NUMBERS = LogLocator(4), LogLocator(10, (1, 2, 5))

Name = Callable[[Row], str]


def kernels(folder: pathlib.Path, name: str, rows: Sequence[Row]) -> None:
    """Milliseconds of each form, a line each, and the least that the device's ceilings allow."""
    named = lambda row: f"{row['kernel']}\n{row['size']}   {row['form']}"
    for theme in THEMES:
        figure, axes = _bars(theme, "Kernels", "milliseconds", [named(row) for row in rows])
        axes.set_xscale("log")
        _numbers(axes)
        passes = zip(("forward", "forward and backward"), _two(theme), (-0.1, 0.1), strict=True)
        for which, colour, aside in passes:
            of = [row for row in rows if row["pass"] == which]
            _points(axes, "ms", of, named, colour, which, aside)
            at, marks = _at(axes, map(named, of), aside), {"marker": "|", "s": 50, "zorder": 2}
            axes.scatter([_least(row) for row in of], at, color=colour, alpha=0.7, **marks)
        axes.scatter([], [], color=theme.muted, label="least, by copy and product", **marks)
        legend(axes, theme, "above")
        write(folder, name, theme, figure)


def train(folder: pathlib.Path, name: str, rows: Sequence[Row]) -> None:
    """Tokens a second of every model, from 0."""
    named = lambda row: str(row["model"])
    for theme in THEMES:
        figure, axes = _bars(theme, "Training", "tokens per second", [named(row) for row in rows])
        _points(axes, "tokens/s", rows, named, theme.train, "")
        axes.set_xlim(0, 1.1 * max(row["tokens/s" + SPREAD][1] for row in rows))
        write(folder, name, theme, figure)


def prefill(folder: pathlib.Path, name: str, rows: Sequence[Row]) -> None:
    """Tokens a second by the length of the prompt, a panel for each batch."""
    _by_context(folder, name, rows, "tokens/s", "tokens per second", shown)


def decode(folder: pathlib.Path, name: str, rows: Sequence[Row]) -> None:
    """Microseconds a step by the context, a panel for each batch, and bytes of state."""
    _by_context(folder, name, rows, "us a step", "microseconds a step", shown)
    one = [row for row in rows if row["batch"] == rows[0]["batch"]]
    _by_context(folder, f"{name}_state", one, STATE, "state of one sequence", readable.size)


def _by_context(
    folder: pathlib.Path,
    name: str,
    rows: Sequence[Row],
    figure: str,
    unit: str,
    text: Callable[[float], str],
) -> None:
    """A line for each model, from context to context, with a bar from quartile to quartile."""
    batches = sorted({row["batch"] for row in rows})[:MOST]
    for theme in THEMES:
        drawn = Figure((WIDTH, HEIGHT), dpi=DPI, layout="constrained", facecolor=theme.paper)
        panels = drawn.subplots(1, len(batches), sharey=True, squeeze=False)[0]
        ends = []
        for axes, batch in zip(panels, batches, strict=True):
            of = [row for row in rows if row["batch"] == batch]
            title = unit + f", batch {batch}" * (figure != STATE)
            ends.append(_panel(axes, theme, of, figure, title, NAMES * len(batches)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: text(float(y))))
            axes.yaxis.set_major_locator(BYTES if figure == STATE else NUMBERS)
        for axes, names in zip(panels, ends, strict=True):  # the panels' common scale is final
            labels.column(axes, names)
        write(folder, name, theme, drawn)


def _panel(
    axes: Axes, theme: Theme, rows: Sequence[Row], figure: str, title: str, names: float
) -> list[Label]:
    """Draws lines; a part of the width, on the right, is left for the names that are returned."""
    _plain(axes, theme)
    axes.set_title(title, color=theme.ink, fontsize=10, weight="bold", loc="left")
    axes.set_xlabel("tokens of context", color=theme.muted, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(axis="y", color=theme.grid, lw=0.9)
    contexts = sorted({row["context"] for row in rows})
    wide = max(2.0, contexts[-1] / contexts[0])
    axes.set_xlim(contexts[0] / 1.3, contexts[-1] * wide ** (names / (1 - names)))
    axes.set_xticks(contexts, [_tokens(n) for n in contexts])
    axes.yaxis.set_minor_locator(NullLocator())
    ends = []
    for at, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        of = sorted((r for r in rows if r["model"] == model), key=lambda row: row["context"])
        xs, ys = [row["context"] for row in of], [row[figure] for row in of]
        colour = COLOURS[at % len(COLOURS)]
        axes.plot(xs, ys, color=colour, lw=1.3, marker="o", ms=4, zorder=3)
        if figure + SPREAD in of[0]:
            axes.vlines(xs, *np.transpose([row[figure + SPREAD] for row in of]), color=colour, lw=2)
        ends.append(Label(model, xs[-1], ys[-1], colour))
    return ends


def _bars(theme: Theme, title: str, along: str, names: Sequence[str]) -> tuple[Figure, Axes]:
    """An empty chart with a named line for each thing that is measured."""
    names = list(dict.fromkeys(names))
    size = (WIDTH, 1.3 + LINE * max(3, len(names)))
    figure, axes = canvas(size, theme, title, "median and quartiles", along=along)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=theme.grid, lw=0.9)
    _numbers(axes)
    return figure, axes


def _numbers(axes: Axes) -> None:
    """Whole numbers along x rather than powers; a change of scale forgets it."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shown(float(x))))
    axes.xaxis.set_minor_locator(NullLocator())


def _points(
    axes: Axes,
    figure: str,
    rows: Sequence[Row],
    named: Name,
    colour: str,
    label: str,
    aside: float = 0.0,
) -> None:
    """Medians at their lines, with a bar from quartile to quartile."""
    at = _at(axes, map(named, rows), aside)
    axes.scatter([row[figure] for row in rows], at, s=22, color=colour, label=label, zorder=3)
    if rows:
        low, high = np.transpose([row[figure + SPREAD] for row in rows])
        axes.hlines(at, low, high, color=colour, lw=1.6, zorder=3)


def _at(axes: Axes, names: Iterable[str], aside: float) -> list[float]:
    lines = [text.get_text() for text in axes.get_yticklabels()]
    return [lines.index(name) + aside for name in names]


def _least(row: Row) -> float:
    """Milliseconds that moving a row's bytes takes, or its products where they take longer."""
    moving = row["bytes"] / row["copy GB/s"]
    return max(moving, row.get("operations", 0) / row["product GFLOP/s"]) / 1e6


def _plain(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=theme.grid)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0, which="both")


def _tokens(number: int) -> str:
    """1k, 64k, 1M, in powers of 1024 where it is one."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if number % unit == 0:
            return f"{number // unit}{name}"
    return f"{number:,}"


def _two(theme: Theme) -> tuple[str, str]:
    return theme.train, theme.held_out
