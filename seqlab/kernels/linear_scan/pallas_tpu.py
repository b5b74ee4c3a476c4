"""The scan as a pair of TPU kernels, which read and write every number once.

The grid is (batch, blocks of numbers, chunks): the last state of a chunk stays in the vector memory
for the next. Inside, tiles of 8 tokens follow one another, numbers along lanes; of a tile, what its
tokens do up to each is found in three rounds of doubling.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ModelError
from seqlab.kernels.linear_scan import gradient
from seqlab.kernels.linear_scan.planes import one_like
from seqlab.kernels.on_tpu.call import call
from seqlab.kernels.on_tpu.tiles import LANES
from seqlab.kernels.platforms import Forms
from seqlab.parallel.transitions import Diagonal

WIDTHS = (512, 256, 128)  # numbers of a block
BLOCK = 2**17  # numbers of a chunk of it: half a megabyte
TILE = 8  # tokens

_each = jax.tree.map  # a number is an array or the planes of a Complex


def scanned(a, b, reset, state, *, interpret: Any = False):
    """The definition's arguments and results; `pltpu.InterpretParams()` runs it on any machine."""
    if not suits(state):
        [number, *_] = jax.tree.leaves(state)
        raise ModelError(
            f"The TPU kernel of linear_scan takes a multiple of {LANES} numbers, not "
            f"{list(number.shape[1:])}: leave the implementation to None."
        )
    on_tpu: Any = OnTPU(interpret)
    return gradient.scanned(a, b, reset, state, Forms(on_tpu))


def form(state) -> Any:
    """The kernels as a form of `gradient.scan`; None where they do not suit."""
    return OnTPU() if suits(state) else None


def suits(state) -> bool:
    """Whether the kernels can run numbers like those of the state [B, ...]."""
    [number, *_] = jax.tree.leaves(state)
    return math.prod(number.shape[1:]) % LANES == 0


class OnTPU(NamedTuple):
    """The kernels as a form of `gradient.scan`."""

    interpret: Any = False

    def run(self, a, b, state):
        plan = Plan.of(a, backward=False)
        results = [(plan.tokens, b), (plan.state, state)]
        given = [(plan.tokens, a), *results]
        return self._call(_forward_kernel, plan, given, results, "linear_scan_forward")

    def backward(self, a, h, state, dh, d_last):
        plan = Plan.of(a, backward=True)
        ends = slice(plan.size - 1, plan.T - 1, plan.size)  # of all chunks but the last
        entering = _each(lambda s, h: jnp.concatenate([s[:, None], h[:, ends]], 1), state, h)
        cotangents = [(plan.tokens, dh), (plan.state, d_last)]
        given = [(plan.tokens, a), (plan.tokens, h), (plan.entering, entering), *cotangents]
        results = [(plan.tokens, a), *cotangents]
        return self._call(_backward_kernel, plan, given, results, "linear_scan_backward")

    def _call(self, kernel, plan: "Plan", given: list, results: list, name: str):
        """`given` and `results` are pairs of how a number lies and the number, or one like it."""
        leaves = lambda pairs: [(lay, x) for lay, number in pairs for x in jax.tree.leaves(number)]
        found = call(
            functools.partial(kernel, plan=plan),
            plan.grid,
            [lay(x) for lay, x in leaves(given)],
            [
                (jax.eval_shape(lambda x, lay=lay: lay(x)[0], x), lay(x)[1])
                for lay, x in leaves(results)
            ],
            semantics=("parallel", "parallel", "arbitrary"),
            cost=(tuple, [], 1),  # what it moves is all that it takes
            name=name,
            interpret=self.interpret,
        )
        found = [
            x[:, : plan.T].reshape(like.shape)
            for x, (_, like) in zip(found, leaves(results), strict=True)
        ]
        return tuple(plan.numbers(found))


class Plan(NamedTuple):
    """How B sequences of T tokens of E numbers are cut, and how they lie; `kind` is the structure
    of a number."""

    kind: Any
    B: int
    T: int
    E: int
    backward: bool

    @classmethod
    def of(cls, a, backward: bool) -> "Plan":
        leaves, kind = jax.tree.flatten(a)
        B, T = leaves[0].shape[:2]
        return cls(kind, B, T, math.prod(leaves[0].shape[2:]), backward)

    @property
    def width(self) -> int:
        return next(width for width in WIDTHS if self.E % width == 0)

    @property
    def size(self) -> int:
        """Tokens of a chunk."""
        return min(BLOCK // self.width, -(-self.T // TILE) * TILE)

    @property
    def chunks(self) -> int:
        return -(-self.T // self.size)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.B, self.E // self.width, self.chunks

    def time(self, chunk):
        return self.chunks - 1 - chunk if self.backward else chunk

    def numbers(self, leaves) -> list:
        """Arrays, or references to them, as the numbers whose planes they are."""
        planes = self.kind.num_leaves
        parts = [leaves[i : i + planes] for i in range(0, len(leaves), planes)]
        return [jax.tree.unflatten(self.kind, part) for part in parts]

    def tokens(self, x):
        """[B, T, ...] as it lies, a chunk at least, and the block of it that a step takes."""
        x = x.reshape(self.B, self.T, self.E)
        x = jnp.pad(x, [(0, 0), (0, max(0, self.size - self.T)), (0, 0)])
        index = lambda b, e, c: (b, self.time(c), e)
        return x, pl.BlockSpec((None, self.size, self.width), index)

    def entering(self, x):
        """The same of what enters the chunks [B, N, ...]."""
        index = lambda b, e, c: (b, self.time(c), 0, e)
        return x.reshape(self.B, -1, 1, self.E), pl.BlockSpec((None, None, 1, self.width), index)

    def state(self, x):
        """The same of a state [B, ...], which stays for all chunks."""
        index = lambda b, e, c: (b, 0, e)
        return x.reshape(self.B, 1, self.E), pl.BlockSpec((None, 1, self.width), index)


# ---- kernels ----

FIRST, LAST = slice(1), slice(TILE - 1, TILE)  # rows of a tile


def _forward_kernel(*refs, plan: Plan):
    a, b, initial, h, state = plan.numbers(refs)
    _start(state, initial)
    left = _left(plan)

    def tile(at, before):
        here = _running(Diagonal(*_tokens(a, b, at, left)), plan)(before)
        _set(h, here, at)
        return _rows(here, LAST)

    _set(state, _over_tiles(tile, _get(state), plan))


def _backward_kernel(*refs, plan: Plan):
    a, h, entering, dh, last, da, db, D = plan.numbers(refs)
    _start(D, last)
    left = _left(plan)

    def tile(at, D):
        decay, d = _tokens(a, dh, at, left)
        final = _row(jax.tree.leaves(d)[0]) == TILE - 1
        later = _either(final, one_like(decay), _rolled(decay, TILE - 1))
        lamb = _running(Diagonal(later.conj(), d), plan)(D)
        previous = pl.ds(pl.multiple_of(jnp.maximum(at.start - TILE, 0), TILE), TILE)
        enters = _either(at.start == 0, _get(entering), _rows(_get(h, previous), LAST))
        first = _row(jax.tree.leaves(d)[0]) == 0
        before = _either(first, enters, _rolled(_get(h, at), 1))
        _set(da, lamb * before.conj(), at)
        _set(db, lamb, at)
        return _rows(decay, FIRST).conj() * _rows(lamb, FIRST)

    _set(D, _over_tiles(tile, _get(D), plan))


def _get(refs, at: Any = ...):
    return _each(lambda ref: ref[at], refs)


def _set(refs, values, at: Any = ...):
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[at] = value


def _rows(number, rows: slice):
    return _each(lambda x: x[rows], number)


def _row(x):
    return lax.broadcasted_iota(jnp.int32, x.shape, 0)


def _rolled(number, step: int):
    return _each(lambda x: pltpu.roll(x, step, 0), number)


def _either(condition, x, y):
    return _each(lambda x, y: jnp.where(condition, x, y), x, y)


def _start(state, initial):
    @pl.when(pl.program_id(2) == 0)
    def _():
        _set(state, _get(initial))


def _left(plan: Plan):
    """Tokens from this chunk on, None where every chunk is whole. (In a loop a step of the grid
    cannot be asked for.)"""
    whole = plan.T % plan.size == 0
    return None if whole else plan.T - plan.time(pl.program_id(2)) * plan.size


def _tokens(a, b, at, left):
    """A tile of both: tokens beyond the last leave a state be."""
    a, b = _get(a, at), _get(b, at)
    if left is None:
        return a, b
    real = _row(jax.tree.leaves(b)[0]) < left - at.start
    return _either(real, a, one_like(a)), _either(real, b, _each(jnp.zeros_like, b))


def _running(tokens: Diagonal, plan: Plan) -> Diagonal:
    """What a tile's tokens do together with all before them; in the backward pass, all behind."""
    for step in (1, 2, 4):
        tokens = _joined(tokens, step, plan.backward)
    return tokens


def _joined(tokens: Diagonal, step: int, back: bool) -> Diagonal:
    """Every row after the row that is `step` before it, where there is one."""
    shift = TILE - step if back else step
    joined = _rolled(tokens, shift).then(tokens)
    alone = lambda x: _row(x) >= shift if back else _row(x) < shift
    return _each(lambda x, y: jnp.where(alone(x), x, y), tokens, joined)


def _over_tiles(step, carry, plan: Plan):
    """step(tokens, carry) for one tile of a chunk after the other."""
    tiles = plan.size // TILE

    def body(i, carry):
        start = (tiles - 1 - i if plan.backward else i) * TILE
        return step(pl.ds(pl.multiple_of(start, TILE), TILE), carry)

    return lax.fori_loop(0, tiles, body, carry)
