"""Names beside points, where they cover neither each other, nor points, nor lines."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

SIZE = 7.5  # of the letters, in points
CLOSE = 12.0  # points from which on a line leads to the name

#: Offsets of a name's nearest edge from its point, in points; those in front are preferred.
AROUND = [
    (r * np.cos(angle), r * np.sin(angle))
    for r in (6, 12, 20, 30, 42, 56, 72)
    for angle in np.deg2rad([0, 180, 40, -40, 140, -140, 90, -90, 20, -20, 160, -160])
]
RIGHT = [(8.0, 0.0), *((20.0, sign * 3.0 * n) for n in range(1, 100) for sign in (1, -1))]


class Label(NamedTuple):
    text: str
    x: float
    y: float
    colour: str


def write(
    axes: Axes,
    labels: Sequence[Label],
    lines: Iterable[Sequence[tuple[float, float]]] = (),
    offsets: Sequence[tuple[float, float]] = AROUND,
) -> None:
    """Write each label at the offset from its point that covers least, with a line to the point
    where it is not close. `lines` are to stay visible. Limits and scales of the axes are final."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are of a figure"
    figure.draw_without_rendering()  # so that the layout is known
    pixel, to_pixels = figure.dpi / 72, axes.transData.transform
    seen = np.concatenate([_along(to_pixels(np.array(line, float))) for line in lines])
    points = to_pixels([(label.x, label.y) for label in labels])
    taken: list[Bbox] = []
    for at in np.argsort(-points[:, 1], kind="stable"):
        label, point = labels[at], points[at]
        text = axes.text(0, 0, label.text, fontsize=SIZE, color=label.colour, va="center")
        text.set_in_layout(False)
        extent = text.get_window_extent()
        boxes = [_box(point, np.array(offset) * pixel, extent) for offset in offsets]
        costs = [_cost(box, taken, seen, axes.bbox) for box in boxes]
        best = int(np.argmin(np.array(costs) + 0.03 * np.arange(len(costs))))
        taken.append(box := boxes[best])
        middle = axes.transData.inverted().transform((box.x0, (box.y0 + box.y1) / 2))
        text.set_position((float(middle[0]), float(middle[1])))
        if np.hypot(*offsets[best]) > CLOSE:
            _lead(axes, point, box, label.colour)


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
    beyond = max(0.0, *frame.min - box.min, *box.max - frame.max)
    return 40 * covered + min(hidden, 8) + beyond / box.height


def _lead(axes: Axes, point: np.ndarray, box: Bbox, colour: str) -> None:
    """A thin line from the point to the nearest place of the box."""
    end = np.clip(point, [box.x0 - 2, (box.y0 + box.y1) / 2], [box.x1 + 2, (box.y0 + box.y1) / 2])
    xs, ys = axes.transData.inverted().transform([point, end]).T
    axes.plot(xs, ys, color=colour, lw=0.5, alpha=0.6, zorder=1, scalex=False, scaley=False)
