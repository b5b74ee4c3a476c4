"""The curves of a run as PNG files, each in a light and a dark version.

Only matplotlib's objects are used: pyplot's global state belongs to whoever calls us.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, ScalarFormatter

from seqlab.train import readable

DPI = 200
TITLE = 0.4  # inches above the axes
FEW = 30  # points that are marked one by one
DRAWN = 5000  # raw points that are drawn at most
SETTLED = 0.05  # the part of a run that may lie outside of the frame
ROUND = [1, 2, 2.5, 5, 10]  # tick distances, in powers of ten
LOG_ABOVE = 30.0  # the range of gradient norms from which on their axis is logarithmic


@dataclass(frozen=True)
class Theme:
    suffix: str
    paper: str
    ink: str
    muted: str
    grid: str
    train: str
    held_out: str
    bad: str


THEMES = (
    Theme("", "#ffffff", "#1c2430", "#667085", "#e8ebf0", "#2f6fde", "#e8702a", "#d02c3e"),
    Theme(".dark", "#171c24", "#e6eaf1", "#939dae", "#2a323e", "#6ea3ff", "#ffa15c", "#ff6b7a"),
)


@dataclass(frozen=True)
class Chart:
    """One curve over the steps: the `key` of the rows and how to show it.

    scale: "fit" (the frame ignores the first steep part), "zero" (from 0), "norm" (log if wide).
    """

    name: str
    title: str
    unit: str
    key: str
    scale: str
    held_out: str = ""
    wide: bool = False
    smooth: bool = True

    @property
    def size(self) -> tuple[float, float]:
        """Inches. A page shows a wide chart in its whole width, two others side by side."""
        return (10.4, 3.9) if self.wide else (5.1, 3.0)


CHARTS = (
    Chart(
        "bits_per_byte",
        "Bits per byte",
        "lower is better",
        "bits_per_byte",
        "fit",
        held_out="held_out_bits_per_byte",
        wide=True,
    ),
    Chart("loss", "Loss", "nats per token", "loss", "fit", held_out="held_out_loss"),
    Chart("throughput", "Throughput", "tokens per second", "tokens_per_second", "zero"),
    Chart("learning_rate", "Learning rate", "", "lr", "zero", smooth=False),
    Chart("gradient_norm", "Gradient norm", "before clipping", "grad_norm", "norm"),
)


class Frame(NamedTuple):
    """The limits of a y axis."""

    low: float
    high: float
    log: bool = False


class Curve(NamedTuple):
    steps: np.ndarray  # [N] increasing
    values: np.ndarray  # [N], NaN where the row holds null

    @property
    def finite(self) -> "Curve":
        kept = np.isfinite(self.values)
        return Curve(self.steps[kept], self.values[kept])

    def after(self, step: float) -> np.ndarray:
        return self.values[self.steps >= step]


def draw(rows: Sequence[Mapping], folder: Path, baselines: Mapping[str, float]) -> None:
    """Write `NAME.png` and `NAME.dark.png` of every chart; baselines are in bits per byte."""
    for chart in CHARTS:
        for theme in THEMES:
            lines = baselines if chart.key == "bits_per_byte" else {}
            write(folder, chart.name, theme, _figure(chart, theme, rows, lines))


def write(folder: Path, name: str, theme: Theme, figure: Figure) -> None:
    """Write NAME.png, or of the dark theme NAME.dark.png."""
    figure.savefig(folder / f"{name}{theme.suffix}.png", dpi=DPI, facecolor=theme.paper)


def curve(rows: Sequence[Mapping], key: str) -> Curve:
    """The values of `key` by step; where a step stands twice the later row counts."""
    values = {row["step"]: row[key] for row in rows if key in row}
    steps = sorted(values)
    numbers = [np.nan if values[step] is None else values[step] for step in steps]
    return Curve(np.array(steps, float), np.array(numbers, float))


def smoothed(curve: Curve) -> Curve:
    """The median of a fortieth of the run around each step, at 5000 steps at most."""
    steps, values = curve.finite
    window = min(len(values) // 40, 500) | 1
    stride = -(-len(values) // DRAWN)
    if window == 1:
        return Curve(steps, values)
    around = np.pad(values, window // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(around, window)[::stride]
    return Curve(steps[::stride], np.median(windows, -1))


def frame(chart: Chart, train: Curve, held_out: Curve, lines: Sequence[float]) -> Frame:
    """The y axis that shows the curve well: outliers and the first steep part may leave it."""
    train, held_out = train.finite, held_out.finite
    if not len(train.values):
        return Frame(0.0, max([1.0, *held_out.values, *lines]) * 1.1)
    settled = 0.0
    if len(train.steps) > FEW:
        settled = train.steps[0] + SETTLED * (train.steps[-1] - train.steps[0])
    body = np.percentile(train.after(settled), [0.5, 99.5])
    shown = np.concatenate([body, held_out.after(settled), lines])
    low, high = float(shown.min()), float(shown.max())
    if chart.scale == "zero":
        top = high if chart.smooth else float(train.values.max())
        return Frame(0.0, 1.15 * top or 1.0)
    if chart.scale == "norm" and low > 0 and high / low > LOG_ABOVE:
        return Frame(low / 1.5, high * 1.5, log=True)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Frame(low - pad, high + pad)


def _figure(chart: Chart, theme: Theme, rows: Sequence[Mapping], lines: Mapping) -> Figure:
    figure, axes = canvas(chart.size, theme, chart.title, chart.unit)
    train, held_out = curve(rows, chart.key), curve(rows, chart.held_out)
    if not len(train.steps) and not len(held_out.steps):
        _empty(axes, theme)
        return figure
    _scale(axes, chart, frame(chart, train, held_out, list(lines.values())))
    _span(axes, chart, np.concatenate([train.steps, held_out.steps]))
    _train(axes, chart, theme, train)
    _held_out(axes, theme, held_out)
    for name, value in lines.items():
        label, dashes = f"{name}   {value:.3f}", (0, (5, 3))
        axes.axhline(value, color=theme.muted, lw=1.4, ls=dashes, label=label, zorder=2)
    _lost(axes, theme, train)
    if chart.key == "tokens_per_second" and len(train.finite.values):
        _median(axes, theme, train)
    if chart.held_out:
        legend(axes, theme, "best" if len(train.steps) <= FEW else "upper right")
    return figure


def _train(axes: Axes, chart: Chart, theme: Theme, train: Curve) -> None:
    """The raw values faint and their median over them."""
    if not len(train.finite.values):
        return
    main = smoothed(train) if chart.smooth else train
    if chart.smooth and len(train.steps) > FEW:
        thin = slice(None, None, -(-len(train.steps) // DRAWN))
        axes.plot(*(part[thin] for part in train), color=theme.train, alpha=0.22, lw=0.8)
    label = f"training   {main.finite.values[-1]:.3f}"
    look = {"color": theme.train, "lw": 1.9, "marker": _marker(train), "ms": 4}
    axes.plot(*main, label=label, zorder=3, **look)


def _held_out(axes: Axes, theme: Theme, held_out: Curve) -> None:
    points = held_out.finite
    if len(points.values):
        label = f"held out   {points.values[-1]:.3f}"
        look = {"color": theme.held_out, "lw": 1.6, "marker": _marker(points), "ms": 4.5}
        axes.plot(*points, label=label, zorder=4, **look)


def _lost(axes: Axes, theme: Theme, train: Curve) -> None:
    """A tick on the step axis for each step whose value is not finite."""
    lost = train.steps[np.isnan(train.values)]
    if len(lost):
        look = {"color": theme.bad, "ls": "", "marker": "|", "ms": 9, "mew": 1.5}
        label, floor = f"not finite   {len(lost)}", axes.get_xaxis_transform()
        height = np.full_like(lost, 0.04)
        axes.plot(lost, height, label=label, transform=floor, zorder=5, **look)


def _marker(points: Curve) -> str | None:
    return "o" if len(points.steps) <= FEW else None


def _median(axes: Axes, theme: Theme, train: Curve) -> None:
    label = f"median {readable.count(float(np.median(train.finite.values)))}"
    corner = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
    axes.text(0.99, 0.05, label, color=theme.ink, fontsize=9, **corner)


def legend(
    axes: Axes, theme: Theme, place: Literal["best", "upper right", "above"] = "best"
) -> None:
    """Names of lines, in a box through which they shine, or in a row above the chart."""
    look = {"facecolor": theme.paper, "framealpha": 0.8, "edgecolor": "none"}
    if place == "above":
        look |= {"bbox_to_anchor": (1, 1), "ncols": 3}
    where = "lower right" if place == "above" else place
    axes.legend(loc=where, fontsize=9, handlelength=1.6, labelcolor=theme.ink, **look)


def canvas(
    size: tuple[float, float], theme: Theme, title: str, unit: str, along: str = "step"
) -> tuple[Figure, Axes]:
    """An empty chart of so many inches: title and unit on one line, horizontal grid lines only, and
    `along` below."""
    room, top = 1 - TITLE / size[1], 1 - 0.1 / size[1]
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(rect=(0, 0, 1, room)))
    axes = figure.add_subplot()
    place = {"x": 0.012, "y": top, "ha": "left", "va": "top"}
    figure.suptitle(title, color=theme.ink, fontsize=11, weight="bold", **place)
    figure.text(0.988, top, unit, color=theme.muted, fontsize=9, ha="right", va="top")
    axes.set_facecolor(theme.paper)
    axes.set_xlabel(along, color=theme.muted, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=theme.grid)
    axes.grid(axis="y", which="major", color=theme.grid, lw=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0, which="both")
    return figure, axes


def _empty(axes: Axes, theme: Theme) -> None:
    axes.set_axis_off()
    center = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, "no steps yet", color=theme.muted, fontsize=10, **center)


def _scale(axes: Axes, chart: Chart, limits: Frame) -> None:
    """The y axis: its limits, and ticks with as many digits as they need."""
    if limits.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.set_ylim(limits.low, limits.high)
    if chart.key == "tokens_per_second":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    elif limits.log:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        plain = ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        axes.yaxis.set_major_formatter(plain)


def _span(axes: Axes, chart: Chart, steps: np.ndarray) -> None:
    """The x axis: all steps."""
    first, last = steps.min(), steps.max()
    margin = 0.01 * (last - first) or 1.0
    axes.set_xlim(first - margin, last + margin)
    ticks = 8 if chart.wide else 5
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=ROUND, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _step(step)))


def _short(value: float) -> str:
    """20k rather than 20.0k."""
    number = readable.count(value)
    digits = number.rstrip("kMGT")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + number[len(digits) :]


def _step(step: float) -> str:
    return f"{step:,.0f}" if abs(step) < 1e6 else f"{step / 1e6:g}M"
