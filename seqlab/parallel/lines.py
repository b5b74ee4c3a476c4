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


class Pipeline(NamedTuple):
    """What enters each device of a line, hop after hop.

    hop    (its number, carry) -> the carry after it
    hops   how many there are
    start  the carry before the first
    end    the carry after the last -> what has entered
    """

    hop: Callable[[jax.Array, Any], Any]
    hops: int
    start: Any
    end: Callable[[Any], Any]

    def alone(self) -> Any:
        """What has entered in the end."""
        return self.end(lax.fori_loop(0, self.hops, self.hop, self.start))

    def beside(self, work: Callable[[Callable], Any]) -> tuple[Any, Any]:
        """What has entered in the end, and the result of work(scan).

        scan is `lax.scan`, to be called once, with no more steps than there are hops. Each goes
        beside as many hops: neither needs the other, so blocks travel while the step is done.
        """
        entered = []

        def scan(step, carry, xs, reverse=False):
            steps = len(jax.tree.leaves(xs)[0])
            each = self.hops // steps

            def both(carries, x):
                number, pipe, carry = carries
                for i in range(each):
                    pipe = self.hop(number + i, pipe)
                carry, y = step(carry, x)
                return (number + each, pipe, carry), y

            carries = jnp.zeros((), int), self.start, carry
            (number, pipe, carry), ys = lax.scan(both, carries, xs, reverse=reverse)
            del number
            entered.append(self.end(lax.fori_loop(steps * each, self.hops, self.hop, pipe)))
            return carry, ys

        result = work(scan)
        return entered[0], result


def pipeline(line: Lines, leaving: Callable, entering: Any, cut: Any, blocks: Cut) -> Pipeline:
    """What enters each device, when each passes on what `leaving` makes of what enters it.

    leaving   number of a block, that block of what enters -> that block of what leaves
    entering  what enters the first device of a line; on others its values do not matter
    cut       which of its arrays are cut in blocks; the rest travel whole with every block

    Block j leaves device r in step r + j. Every step sends to the next device, so a program holds
    one pattern of messages however long the line: steps in which a device has nothing to send
    carry a block that nobody keeps.
    """
    highest = blocks.count - 1

    def enter(now, carry):
        """Puts down the block that came last; it is the one to leave next."""
        entered, arrived = carry
        j = now - line.index
        expected = ~line.first & (j >= 0) & (j <= highest)
        j = jnp.clip(j, 0, highest)
        here = blocks.block(entered, cut, j)
        of = lambda take: jax.tree.map(lambda a, h: jnp.where(take, a, h), arrived, here)
        return j, of(~line.first), blocks.replaced(entered, cut, j, of(expected))

    def hop(now, carry):
        j, block, entered = enter(now, carry)
        return entered, line.send(leaving(j, block))

    hops = line.size - 1 + highest
    nothing = jax.tree.map(jnp.zeros_like, blocks.block(entering, cut, 0))
    return Pipeline(hop, hops, (entering, nothing), lambda carry: enter(hops, carry)[2])


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
