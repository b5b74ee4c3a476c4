"""The pictures of a linearization as PNG files, light and dark: what was recovered by how many
tokens, how far each layer is from the teacher's, and what is recalled over which distance."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seqlab.train import readable
from seqlab.train.charts import ROUND, THEMES, Theme, canvas, legend, write

WIDE, HALF = (10.4, 3.9), (5.1, 3.2)  # inches
BEFORE = ("#8f9bb3", "#7d67d8", "#149c78")  # colours of what came before the last


class Picture(NamedTuple):
    name: str
    alt: str
    size: tuple[float, float]


class Line(NamedTuple):
    """Values over places; NaN is a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def draw(
    folder: pathlib.Path,
    stages: Sequence[Line],
    levels: Mapping[str, float],
    transfer: Sequence[Line],
    recall: Sequence[Line],
) -> list[Picture]:
    """Write NAME.png and NAME.dark.png of each picture that has something to show.

    stages    of each, the share of the teacher's perplexity over the tokens since the swap
    levels    the same share of what was not trained, by name
    transfer  relative errors over layers: the last line is the student's, those before how it began
    recall    shares recalled over distances: the teacher's, the baseline's, the student's
    """
    beside = HALF if recall else WIDE
    pictures = [
        (Picture("recovered", "Recovered by tokens trained on", WIDE), stages),
        (Picture("transfer", "Relative error of each layer", beside), transfer),
        (Picture("recall", "Recall by distance", HALF), recall),
    ]
    for theme in THEMES:
        make = {
            "recovered": lambda theme=theme: _recovered(theme, stages, levels),
            "transfer": lambda theme=theme: _transfer(theme, transfer, beside),
            "recall": lambda theme=theme: _recall(theme, recall),
        }
        for picture, shown in pictures:
            if shown:
                write(folder, picture.name, theme, make[picture.name]())
    return [picture for picture, shown in pictures if shown]


def _recovered(theme: Theme, stages: Sequence[Line], levels: Mapping[str, float]) -> Figure:
    unit = "perplexity of the teacher over that of the student"
    figure, axes = canvas(WIDE, theme, "Recovered", unit, "tokens trained on since the swap")
    for at, stage in enumerate(stages):
        axes.plot(stage.xs, stage.ys, color=theme.train, lw=1.9, zorder=3)
        ends = slice(0 if not at else -1, None, len(stage.xs) - 1 or 1)
        label = f"student   {stage.ys[-1]:.1%}" if stage is stages[-1] else None
        look = {"color": theme.train, "ls": "", "marker": "o", "ms": 6, "zorder": 4}
        axes.plot(stage.xs[ends], stage.ys[ends], label=label, **look)
        _named(axes, theme, stage, last=stage is stages[-1])
    for colour, (name, share) in zip((theme.muted, theme.held_out), levels.items(), strict=False):
        label, dashes = f"{name}   {share:.1%}", (0, (5, 3))
        axes.axhline(share, color=colour, lw=1.4, ls=dashes, label=label, zorder=2)
    seen = [*(y for stage in stages for y in stage.ys), *levels.values()]
    spread = max(seen) - min(seen) or 0.1
    axes.set_ylim(max(0.0, min(seen) - 0.16 * spread), max(seen) + 0.08 * spread)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: readable.count(x)))
    legend(axes, theme, "best")
    return figure


def _named(axes: Axes, theme: Theme, stage: Line, last: bool) -> None:
    """The stage's name over the part of the axis that is its."""
    note = {"ha": "center", "va": "bottom", "fontsize": 9, "color": theme.muted}
    middle = (stage.xs[0] + stage.xs[-1]) / 2
    axes.text(middle, 0.02, stage.name, transform=axes.get_xaxis_transform(), **note)
    if not last:
        axes.axvline(stage.xs[-1], color=theme.grid, lw=0.9, zorder=1)


def _transfer(theme: Theme, lines: Sequence[Line], size: tuple[float, float]) -> Figure:
    figure, axes = canvas(size, theme, "Layers", "relative error of the output", "layer")
    colours = [*BEFORE[: len(lines) - 1], theme.train]
    for line, colour in zip(lines, colours, strict=False):
        axes.plot(line.xs, line.ys, color=colour, lw=1.5, marker="o", ms=3.5, label=line.name)
    axes.set_ylim(0, 1.15 * max(y for line in lines for y in line.ys) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=ROUND))
    legend(axes, theme, "best")
    return figure


def _recall(theme: Theme, lines: Sequence[Line]) -> Figure:
    figure, axes = canvas(HALF, theme, "Recall", "share of values named", "tokens back")
    places = range(len(lines[0].xs))
    for line, colour in zip(lines, (theme.muted, theme.held_out, theme.train), strict=True):
        axes.plot(places, line.ys, color=colour, lw=1.7, marker="o", ms=4.5, label=line.name)
    axes.set_xticks(places, [f"{x:,.0f}" for x in lines[0].xs])
    axes.set_ylim(-0.04, 1.06)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    legend(axes, theme, "best")
    return figure
