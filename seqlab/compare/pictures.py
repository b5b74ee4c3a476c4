"""Accuracy against bytes of state and against length as PNG files, light and dark.

What others published stands in a panel of its own beside ours, as its setting is another.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from seqlab.compare import labels
from seqlab.compare.labels import Label
from seqlab.compare.published import Published
from seqlab.compare.results import Result
from seqlab.train import readable
from seqlab.train.charts import DPI, THEMES, Theme, write

Curves = Mapping[str, Sequence[tuple[float, float]]]
COLOURS = ("#2f7fe0", "#e07b1f", "#149c78", "#c765a0", "#9a7d0a", "#7d67d8", "#d0504f", "#4a93a8")
WIDTH = 10.4  # inches, of every picture


class Picture(NamedTuple):
    name: str
    alt: str
    size: tuple[float, float]  # inches


def draw(
    folder: pathlib.Path,
    results: Sequence[Result],
    tests: Sequence[str],
    known: Sequence[Published],
    trained: Sequence[str] = (),
) -> list[Picture]:
    """Write `NAME.png` and `NAME.dark.png` of each picture that has something to show.

    `tests` are the tests' labels by length, `trained` those that are like what was trained on;
    `known` is what was published on the task.
    """
    shown = [result for result in results if math.isfinite(result.accuracy)]
    drawn = []
    if shown:
        theirs = [group for group in known if group.against == "state"]
        size = (WIDTH, 5.8)
        drawn.append(Picture("accuracy_state", "Accuracy against bytes of state", size))
        for theme in THEMES:
            write(folder, drawn[-1].name, theme, _against_state(theme, size, shown, tests, theirs))
    if shown and len(tests) > 1:
        theirs = [group for group in known if group.against == "length"]
        size = (WIDTH, max(4.4, 1.4 + 0.145 * len(shown)))
        drawn.append(Picture("accuracy_length", "Accuracy on each test, by length", size))
        ticks = [f"{test}\nas trained" if test in trained else test for test in tests]
        for theme in THEMES:
            figure = _against_length(theme, size, shown, tests, ticks, theirs)
            write(folder, drawn[-1].name, theme, figure)
    return drawn


def _against_state(theme, size, results, tests, theirs) -> Figure:
    figure, ours, beside = _panels(theme, size, theirs)
    curves: dict[str, list] = {}
    for result in results:
        curves.setdefault(result.label, []).append((result.state_bytes, result.accuracy))
    known = [x for group in theirs for points in group.curves.values() for x, _ in points]
    every = [*known, *(result.state_bytes for result in results)]
    for axes, ticks in ((ours, 4), (beside, 16)):
        if axes is not None:
            _bytes(axes, theme, max(1, min(every)), max(every), ticks)
    measured = "mean over the tests " + ", ".join(tests) if len(tests) > 1 else f"test {tests[0]}"
    _title(ours, theme, "Measured here", measured)
    _curves(ours, theme, curves)
    _published(beside, theme, theirs)
    return figure


def _against_length(theme, size, results, tests, ticks, theirs) -> Figure:
    figure, ours, beside = _panels(theme, size, theirs)
    several = len({result.width for result in results}) > 1
    name = lambda r: f"{r.label} @ {r.width}" if several else r.label
    curves = {name(r): [(i, r.test(test).mean) for i, test in enumerate(tests)] for r in results}
    ours.set_xticks(range(len(tests)), ticks)
    ours.set_xlim(-0.15, (len(tests) - 1) * 1.4 + 0.05)  # names stand on the right
    _title(ours, theme, "Measured here", "by test, from short to long")
    if beside is not None:
        beside.set_xscale("log", base=2)
        beside.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        beside.set_xlabel("tokens", color=theme.muted, fontsize=9)
    _curves(ours, theme, curves, in_column=True)
    _published(beside, theme, theirs)
    return figure


def _panels(theme: Theme, size, theirs) -> tuple[Figure, Axes, Axes | None]:
    """Ours, and beside it a narrower panel where there is something to show in it."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=theme.paper)
    ratios = [1.7, 1] if theirs else [1]
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    for axes in panels:
        axes.set_facecolor(theme.paper)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=theme.grid)
        axes.grid(axis="y", color=theme.grid, lw=0.9)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.muted, labelsize=9, length=0, which="both")
        axes.set_ylim(-0.03, 1.04)
    panels[0].set_ylabel("accuracy", color=theme.muted, fontsize=9)
    return figure, panels[0], panels[1] if theirs else None


def _bytes(axes: Axes, theme: Theme, low: float, high: float, ticks: int) -> None:
    """The x axis: bytes, with room for names on the right."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.6, high * 2.5)
    axes.xaxis.set_major_locator(LogLocator(base=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: readable.size(x)))
    axes.set_xlabel("state of one sequence", color=theme.muted, fontsize=9)


def _title(axes: Axes, theme: Theme, title: str, note: str) -> None:
    axes.set_title(title, color=theme.ink, fontsize=11, weight="bold", loc="left", pad=22)
    place = {"xytext": (0, 8), "textcoords": "offset points", "va": "bottom"}
    axes.annotate(note, (0, 1), xycoords="axes fraction", color=theme.muted, fontsize=8, **place)


def _curves(axes: Axes, theme: Theme, curves: Curves, in_column: bool = False) -> None:
    """A line each with its name at the end."""
    ends = []
    for at, (name, points) in enumerate(sorted(curves.items())):
        colour = COLOURS[at % len(COLOURS)]
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=colour, lw=1.3, marker="o", ms=4.5, zorder=3)
        ends.append(Label(name, xs[-1], ys[-1], colour))
    if in_column:
        labels.column(axes, ends)
    else:
        labels.around(axes, ends, curves.values())


def _published(axes: Axes | None, theme: Theme, theirs: Sequence[Published]) -> None:
    if axes is not None:
        _title(axes, theme, "Published", theirs[0].source.partition(";")[0])
        _curves(axes, theme, {name: pts for group in theirs for name, pts in group.curves.items()})
