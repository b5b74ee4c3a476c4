"""Devices in a line, what one sends to the next, and a pipeline of blocks down the line."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from seqlab.parallel.mesh import SEQ
from seqlab.parallel.transitions import differing


class Lines:
    """The devices of the axis `seq`, in lines of one length that are walked at once.

    lines  numbers of devices, each line in the order in which a state goes down it
    size   of every line
    index  the place of this device in its line
    """

    def __init__(self, lines: Sequence[Sequence[int]]):
        self.lines = [tuple(line) for line in lines]
        self.size = len(self.lines[0])
        place = {device: i for line in self.lines for i, device in enumerate(line)}
        table = jnp.array([place[device] for device in range(len(place))])
        self.index = table[lax.axis_index(SEQ)]

    @property
    def first(self) -> jax.Array:
        return self.index == 0

    @property
    def last(self) -> jax.Array:
        return self.index == self.size - 1

    def send(self, tree: Any, distance: int = 1) -> Any:
        """The tree of the device `distance` places before this one, as one message."""
        starts = range(self.size - distance)
        pairs = [(line[i], line[i + distance]) for line in self.lines for i in starts]
        return as_one(lambda message: lax.ppermute(message, SEQ, pairs), tree)


def as_one(f: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """f, which keeps shapes, of all the arrays in one buffer: one message instead of several."""
    if len(jax.tree.leaves(tree)) == 1:
        return jax.tree.map(f, tree)  # as it lies: laying it flat would be a copy
    flat, restored = ravel_pytree(tree)
    return restored(f(flat))


def size_of(tree: Any) -> int:
    """Bytes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


class Cut(NamedTuple):
    """How arrays are cut in `count` blocks along `axis`, which is counted from the end."""

    axis: int
    count: int

    def block(self, tree: Any, cut: Any, number: jax.Array | int) -> Any:
        """Block `number` of those arrays that `cut` says are cut, and the others whole."""

        def of(a, is_cut):
            size = a.shape[self.axis] // self.count
            axis = a.ndim + self.axis
            return lax.dynamic_slice_in_dim(a, number * size, size, axis) if is_cut else a

        return jax.tree.map(of, tree, cut)

    def replaced(self, tree: Any, cut: Any, number: jax.Array | int, block: Any) -> Any:
        """The arrays with another block `number`."""

        def of(a, is_cut, new):
            start = number * (a.shape[self.axis] // self.count)
            axis = a.ndim + self.axis
            return lax.dynamic_update_slice_in_dim(a, new, start, axis) if is_cut else new

        return jax.tree.map(of, tree, cut, block)


def pipelined(line: Lines, leaving: Callable, entering: Any, cut: Any, blocks: Cut) -> Any:
    """What enters each device, when each passes on what `leaving` makes of what enters it.

    leaving   number of a block, that block of what enters -> that block of what leaves
    entering  what enters the first device of a line; on others its values do not matter
    cut       which of its arrays are cut in blocks; the rest travel whole with every block

    Block j leaves device r in step r + j. Every step sends to the next device, so a program holds
    one pattern of messages however long the line: steps in which a device has nothing to send
    carry a block that nobody keeps.
    """
    highest = blocks.count - 1

    def step(now, entering):
        j = jnp.clip(now - line.index, 0, highest)
        arrived = line.send(leaving(j, blocks.block(entering, cut, j)))
        j = now + 1 - line.index
        expected = ~line.first & (j >= 0) & (j <= highest)
        j = jnp.clip(j, 0, highest)
        keep = lambda new, old: jnp.where(expected, new, old)
        block = jax.tree.map(keep, arrived, blocks.block(entering, cut, j))
        return blocks.replaced(entering, cut, j, block)

    return lax.fori_loop(0, line.size - 1 + highest, step, entering)


def divisible(stretch: Any, *others: Any) -> dict[int, int]:
    """Axis -> what a number of blocks along it must divide, for a transition and what is cut with
    it; the axes along which parts of the state do not mix."""
    sizes = {}
    for axis in range(-jax.tree.leaves(stretch)[-1].ndim, 0):
        cut = stretch.cut(axis)
        if cut is not None:
            everything = (stretch, *others), (cut, *differing(others, axis))
            arrays = zip(*map(jax.tree.leaves, everything), strict=True)
            sizes[axis] = math.gcd(*(a.shape[axis] for a, is_cut in arrays if is_cut)) or 1
    return sizes
