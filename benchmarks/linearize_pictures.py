"""The figures of benchmarks.linearize_demo as PNG files, light and dark."""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from seqlab.compare.labels import Label, column
from seqlab.compare.pictures import COLOURS
from seqlab.train import readable
from seqlab.train.charts import THEMES, Theme, canvas, write

SIZE = 7.4, 4.4  # inches
PERCENT = FuncFormatter(lambda share, _: f"{share:.0%}")
Row = dict[str, Any]  # of the demo's table


def draw(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Write linearize_recovered and linearize_recall, each with its .dark version."""
    teacher, *students = rows
    colours = dict(zip((row["method"] for row in students), COLOURS, strict=False))
    for theme in THEMES:
        drawn = recovered(theme, teacher, students, colours)
        write(folder, "linearize_recovered", theme, drawn)
        write(folder, "linearize_recall", theme, recalled(theme, rows, colours))


def recovered(theme: Theme, teacher: Row, students: Sequence[Row], colours) -> Figure:
    """From the swap on, after each stage."""
    unit = "perplexity of the teacher over that of the student"
    figure, axes = canvas(SIZE, theme, "Recovered", unit, "tokens trained on since the swap")
    ends = []
    for row in students:
        found = [row[name] for name in ("at the swap", "after stage 1", "after stage 2")]
        shares = [teacher["perplexity"] / one for one in found if one is not None]
        tokens = [row["tokens"] * i / max(len(shares) - 1, 1) for i in range(len(shares))]
        ends.append(_line(axes, row["method"], tokens, shares, colours))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: readable.count(x)))
    return _named(figure, axes, ends)


def recalled(theme: Theme, rows: Sequence[Row], colours) -> Figure:
    """Over each distance, the teacher's in grey."""
    figure, axes = canvas(SIZE, theme, "Recall", "share of values named", "tokens back")
    names = [name for name in rows[0] if name.startswith("recall ")]
    look = {"teacher": theme.muted} | colours
    ends = [
        _line(axes, row["method"], range(len(names)), [row[n] for n in names], look) for row in rows
    ]
    axes.set_xticks(range(len(names)), [name.removeprefix("recall ") for name in names])
    axes.set_ylim(-0.04, 1.06)
    return _named(figure, axes, ends)


def decoding(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Write linearize_decode: a token's time after so many others."""
    names = [name for name in rows[0] if name != "tokens read"]
    xs = [row["tokens read"] for row in rows]
    for theme in THEMES:
        figure, axes = canvas(SIZE, theme, "Decoding", "milliseconds a token", "tokens read before")
        colours = {"teacher": theme.muted} | dict(zip(names[1:], COLOURS, strict=False))
        ends = [_line(axes, name, xs, [row[name] for row in rows], colours) for name in names]
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [readable.count(x) for x in xs])
        axes.set_ylim(bottom=0)
        axes.set_xlim(xs[0] / 1.2, xs[-1] * 4)
        column(axes, ends)
        write(folder, "linearize_decode", theme, figure)


def _line(axes: Axes, name: str, xs, ys, colours) -> Label:
    axes.plot(xs, ys, color=colours[name], lw=1.7, marker="o", ms=4.5)
    return Label(name, xs[-1], ys[-1], colours[name])


def _named(figure: Figure, axes: Axes, ends: Sequence[Label]) -> Figure:
    """Shares on the left, and names at the ends of the lines."""
    axes.yaxis.set_major_formatter(PERCENT)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.3 * (high - low))
    column(axes, ends)
    return figure
