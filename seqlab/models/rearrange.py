"""Rules between our weights and a checkpoint's tensors, read in both directions.

A rule only rearranges: it transposes, reshapes, splits and joins, and never computes. So what is
imported and exported again, or exported and imported again, is the same to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqlab.errors import ModelError


class Step(NamedTuple):
    """One rearrangement of a list of arrays, and its inverse."""

    ours: Callable[[list], list]  # from theirs to ours
    theirs: Callable[[list], list]


class Rule(NamedTuple):
    """Some of our weights are some of their tensors, rearranged by `steps` (read from theirs)."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    repeat: int | None = None  # which slice of ours, along the axis that stacks the repeats

    def read(self, theirs: Sequence[Any]) -> list:
        """Their tensors -> ours: views, or `Joined` where one of ours is made of several."""
        arrays = list(theirs)
        for step in self.steps:
            arrays = step.ours(arrays)
        return arrays

    def write(self, ours: Sequence[Any]) -> list:
        """Our weights -> theirs."""
        arrays = list(ours)
        for step in reversed(self.steps):
            arrays = step.theirs(arrays)
        return arrays


def rule(ours: str | Sequence[str], theirs: str | Sequence[str], *steps: Step) -> Rule:
    """`rule("norm.weight", "model.norm.weight")`; several names on a side stand in order."""
    names = lambda given: (given,) if isinstance(given, str) else tuple(given)
    return Rule(names(ours), names(theirs), steps)


def linear(ours: str, theirs: str) -> list[Rule]:
    """A linear map, which torch stores as [out, in], and its bias where our model has one."""
    return [
        rule(f"{ours}.weight", f"{theirs}.weight", TRANSPOSE),
        rule(f"{ours}.bias", f"{theirs}.bias"),
    ]


def norm(ours: str, theirs: str) -> list[Rule]:
    """A norm's weight, and its bias where our model has one."""
    return [rule(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def conv(ours: str, theirs: str, width: int) -> list[Rule]:
    """A depthwise convolution, which torch stores as [channels, 1, width], and its bias."""
    squeezed = reshape((-1, 1, width), (-1, width))
    return [
        rule(f"{ours}.weight", f"{theirs}.weight", squeezed, TRANSPOSE),
        rule(f"{ours}.bias", f"{theirs}.bias"),
    ]


def transpose(*order: int) -> Step:
    """Permute the axes of each array: numpy's `transpose`."""
    back = tuple(int(i) for i in np.argsort(order))
    return each(lambda a: a.transpose(order), lambda a: a.transpose(back))


def reshape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Step:
    """Reshape each array between these two shapes; one size of each may be -1."""
    return each(lambda a: a.reshape(ours), lambda a: a.reshape(theirs))


def split(*sizes: int, axis: int = 0) -> Step:
    """One of theirs is several of ours, which lie along an axis with these sizes."""
    return Step(lambda arrays: _split(arrays, sizes, axis), lambda arrays: [_join(arrays, axis)])


def join(*sizes: int, axis: int = 0) -> Step:
    """Several of theirs are one of ours, where they lie along an axis with these sizes.

    As the last step it reads nothing: only what is asked of the joined array.
    """
    return Step(
        lambda arrays: [Joined([np.asarray(a) for a in arrays], axis)],
        lambda arrays: _split(arrays, sizes, axis),
    )


def stack(n: int) -> Step:
    """n of theirs, of one shape, are one of ours with a new axis in front (experts)."""
    return Step(
        lambda arrays: [Joined([np.asarray(a)[None] for a in arrays])],
        lambda arrays: [a[0] for a in _split(arrays, (1,) * n, 0)],
    )


def first(n: int, step: Step) -> Step:
    """`step` for the first n of theirs, which become one of ours; those behind stay."""
    return Step(
        lambda arrays: [*step.ours(arrays[:n]), *arrays[n:]],
        lambda arrays: [*step.theirs(arrays[:1]), *arrays[1:]],
    )


def copies(n: int) -> Step:
    """One of theirs is n of ours, all the same."""
    return Step(lambda arrays: [*arrays] * n, _one)


class Joined:
    """Arrays end to end along an axis, read only where they are indexed."""

    def __init__(self, parts: Sequence[Any], axis: int = 0):
        self.parts, self.axis = list(parts), axis
        first = self.parts[0]
        rest = {p.shape[:axis] + p.shape[axis + 1 :] for p in parts}
        if len(rest) > 1 or len({p.dtype for p in parts}) > 1:
            raise ValueError(f"{[p.shape for p in parts]} do not join along axis {axis}")
        length = sum(p.shape[axis] for p in parts)
        self.shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
        self.dtype = first.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part that one slice of step 1 an axis asks for, as an array of its own."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        begin, end, _ = index[self.axis].indices(self.shape[self.axis])
        pieces, offset = [], 0
        for part in self.parts:
            size = part.shape[self.axis]
            here = slice(max(begin - offset, 0), min(end - offset, size))
            if here.start < here.stop:
                pieces.append(part[(*index[: self.axis], here, *index[self.axis + 1 :])])
            offset += size
        if not pieces:
            pieces = [self.parts[0][(*index[: self.axis], slice(0), *index[self.axis + 1 :])]]
        return np.concatenate(pieces, self.axis)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[()], dtype)


def each(ours: Callable[[np.ndarray], Any], theirs: Callable[[np.ndarray], Any]) -> Step:
    """A function of each array, and its inverse."""
    return Step(
        lambda arrays: [ours(np.asarray(a)) for a in arrays],
        lambda arrays: [theirs(np.asarray(a)) for a in arrays],
    )


def _split(arrays: list, sizes: Sequence[int], axis: int) -> list:
    (array,) = arrays
    if array.shape[axis] != sum(sizes):
        raise ValueError(f"axis {axis} of {array.shape} does not split into {sizes}")
    return np.split(np.asarray(array), np.cumsum(sizes)[:-1], axis)


def _one(arrays: list) -> list:
    if not all(np.array_equal(arrays[0], a) for a in arrays):
        raise ModelError(
            "Copies of a tensor that the published layout holds once have been trained apart: "
            "save the model with seqlab.save."
        )
    return arrays[:1]


def _join(arrays: list, axis: int) -> np.ndarray:
    return np.concatenate([np.asarray(a) for a in arrays], axis)


#: [out, in] of torch's linear maps <-> our [in, out].
TRANSPOSE = transpose(1, 0)
