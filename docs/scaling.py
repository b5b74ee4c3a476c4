"""The picture of scaling.md, from the cost model alone.

python docs/scaling.py
"""

import pathlib
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from seqlab.parallel.cost import EXACT, LINKS, Link
from seqlab.parallel.iteration import ZECO, compute, iteration

PICTURE = pathlib.Path(__file__).parent / "scaling.png"
INK, GRID = "#808890", "#80889040"  # legible on white and on black, as the paper is left out
COLOURS = dict(zip(EXACT, ("#d55e00", "#cc79a7", "#0c8ce9", "#b8860b", "#009e73"), strict=True))
MARKS = dict(zip(EXACT, "os^Dv", strict=True))

DEVICES = 256
LENGTHS = [2**power for power in range(20, 24)]  # tokens: 1M to 8M
MANY = [2**power for power in range(4, 11)]
TOKENS = 16_384  # a device, where the devices grow in number


def draw() -> Figure:
    """Above, time against sequence length on 256 devices; below, against devices."""
    figure = Figure(figsize=(10.4, 7.4), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", squeeze=False)
    for column, name in zip(axes.T, ("h100", "v5p"), strict=True):
        link = LINKS[name]
        title = "H100, 8 in a node" if link.between else "TPU v5p"
        _lines(column[0], LENGTHS, lambda n: (n // DEVICES, DEVICES), link)
        column[0].set_title(f"{title}: {DEVICES} devices", color=INK, loc="left")
        column[0].set_xlabel("tokens of a sequence", color=INK)
        column[0].xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 2**20:.0f}M"))
        _lines(column[1], MANY, lambda n: (TOKENS, n), link)
        column[1].set_title(f"{title}: {TOKENS:,} tokens a device", color=INK, loc="left")
        column[1].set_xlabel("devices (and 16K tokens times as many)", color=INK)
        column[1].xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    for row in axes:
        row[0].set_ylabel("ms a training step", color=INK)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=6, frameon=False, labelcolor=INK
    )
    return figure


def _lines(at: Axes, xs: list[int], sizes: Callable[[int], tuple[int, int]], link: Link) -> None:
    """A line a strategy; `sizes` is tokens a device and devices."""
    for name in EXACT:
        times = [1e3 * iteration(name, ZECO, *sizes(x), link) for x in xs]
        style = {"color": COLOURS[name], "marker": MARKS[name], "markersize": 5}
        at.plot(xs, times, label=name, linewidth=1.8, **style)
    alone = [1e3 * compute(ZECO, sizes(x)[0], link) for x in xs]
    at.plot(xs, alone, color=INK, linestyle=(0, (4, 3)), linewidth=1.4, label="computation alone")
    at.set_xscale("log", base=2)
    at.set_yscale("log")
    at.set_xticks(xs)
    at.xaxis.set_minor_locator(NullLocator())
    at.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,.0f}"))
    at.yaxis.set_minor_formatter(FuncFormatter(lambda ms, _: f"{ms:,.0f}" if _second(ms) else ""))
    at.grid(color=GRID, which="major")
    at.tick_params(colors=INK, which="both", labelleft=True)
    for spine in at.spines.values():
        spine.set_color(GRID)


def _second(ms: float) -> bool:
    """Of 10, 20, ... 90 those that are labelled too: 20 and 50."""
    return int(ms / 10 ** np.floor(np.log10(ms)) + 0.5) in (2, 5)


if __name__ == "__main__":
    draw().savefig(PICTURE, dpi=150, transparent=True)
