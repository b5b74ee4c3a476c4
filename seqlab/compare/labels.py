"""Names beside points, where they cover neither each other, nor points, nor lines."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SIZE = 7.5  # of the letters, in points
CLOSE = 12.0  # points from which on a line leads to the name

#: Offsets of a name's nearest edge from its point, in points; those in front are preferred.
AROUND = [
    (r * np.cos(angle), r * np.sin(angle))
    for r in (6, 12, 20, 30, 42, 56, 72)
    for angle in np.deg2rad([0, 180, 40, -40, 140, -140, 90, -90, 20, -20, 160, -160])
]


class Label(NamedTuple):
    text: str
    x: float
    y: float
    colour: str


def around(
    axes: Axes, labels: Sequence[Label], lines: Iterable[Sequence[tuple[float, float]]]
) -> None:
    """Write each label where it covers least, with a line to its point where it is not close.

    `lines` are to stay visible. Limits and scales of the axes are final.
    """
    pixel, points = _pixels(axes, labels)
    seen = np.concatenate([_along(axes.transData.transform(np.array(line))) for line in lines])
    taken: list[Bbox] = []
    for at in np.argsort(-points[:, 1], kind="stable"):
        text = _text(axes, labels[at])
        extent = text.get_window_extent()
        boxes = [_box(points[at], np.array(offset) * pixel, extent) for offset in AROUND]
        costs = [_cost(box, taken, seen, axes.bbox) for box in boxes]
        best = int(np.argmin(np.array(costs) + 0.03 * np.arange(len(costs))))
        taken.append(box := boxes[best])
        _put(axes, text, box.x0, (box.y0 + box.y1) / 2)
        if np.hypot(*AROUND[best]) > CLOSE:
            middle = (box.y0 + box.y1) / 2
            _lead(axes, points[at], np.clip(points[at], (box.x0, middle), (box.x1, middle)), text)


def column(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels right of their points in one column, in the order of the points: each as high
    as its point, or else just above the one below it."""
    pixel, points = _pixels(axes, labels)
    order = np.argsort(points[:, 1], kind="stable")
    steps = 1.25 * SIZE * pixel * np.arange(len(labels))
    heights = np.maximum.accumulate(points[order, 1] - steps) + steps
    heights = np.minimum(heights, heights[-1:].clip(max=axes.bbox.y1) - steps[::-1])
    x = points[:, 0].max() + 22 * pixel
    for at, height in zip(order, heights, strict=True):
        text = _text(axes, labels[at])
        _put(axes, text, x, height)
        _lead(axes, points[at] + [5 * pixel, 0], np.array([x - 2 * pixel, height]), text)


def _pixels(axes: Axes, labels: Sequence[Label]) -> tuple[float, np.ndarray]:
    """A point in pixels, and the labels' places in pixels [N, 2], when the layout is known."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are of a figure"
    figure.draw_without_rendering()
    return figure.dpi / 72, axes.transData.transform([(label.x, label.y) for label in labels])


def _text(axes: Axes, label: Label) -> Text:
    text = axes.text(0, 0, label.text, fontsize=SIZE, color=label.colour, va="center")
    text.set_in_layout(False)
    return text


def _put(axes: Axes, text: Text, x: float, y: float) -> None:
    """With its left edge at x and its middle at y, in pixels."""
    left, middle = axes.transData.inverted().transform((x, y))
    text.set_position((float(left), float(middle)))


def _along(corners: np.ndarray) -> np.ndarray:
    """Points on the way from corner to corner, [N, 2]."""
    pairs = list(zip(corners, corners[1:], strict=False))
    return np.concatenate([corners, *(np.linspace(a, b, 24) for a, b in pairs)])


def _box(point: np.ndarray, offset: np.ndarray, extent: Bbox) -> Bbox:
    """Where a text of this extent stands with its nearest edge at the offset."""
    side = 0.0 if offset[0] > 1 else 1.0 if offset[0] < -1 else 0.5
    x, y = point + offset
    height = extent.height
    return Bbox.from_bounds(x - side * extent.width, y - height / 2, extent.width, height)


def _cost(box: Bbox, taken: list[Bbox], seen: np.ndarray, frame: Bbox) -> float:
    """What other names take of the box counts most, then what it covers, and leaving the frame."""
    shared = [Bbox.intersection(box, other) for other in taken]
    covered = sum(s.width * s.height for s in shared if s is not None) / (box.width * box.height)
    near = box.padded(2)
    hidden = ((seen >= near.min) & (seen <= near.max)).all(1).sum()
    beyond = max(0.0, *np.subtract(frame.min, box.min), *np.subtract(box.max, frame.max))
    return 40 * covered + min(hidden, 8) + 4 * beyond / box.height


def _lead(axes: Axes, start: np.ndarray, end: np.ndarray, text: Text) -> None:
    """A thin line between two places in pixels."""
    xs, ys = axes.transData.inverted().transform([start, end]).T
    look = {"color": text.get_color(), "lw": 0.5, "alpha": 0.6, "zorder": 1}
    axes.plot(xs, ys, scalex=False, scaley=False, **look)
