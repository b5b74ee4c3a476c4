"""`seqlab bench kernels`: forms of a kernel family beside each other and the device.

Of a form the least number of bytes counts (each argument read once, each result written once; with
gradients, arguments and results once more, and the gradients), and the operations of the products
in the XLA form, so that all forms are held against the same work.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab import settings
from seqlab.bench import machine
from seqlab.bench.ceilings import Ceilings, operands
from seqlab.bench.contestants import gather, size_of
from seqlab.bench.families import CASES, FAMILIES, Case, Draw, Shape, implementations
from seqlab.bench.record import Row
from seqlab.bench.sizes import combinations
from seqlab.bench.timing import Laps, Work, figure, race, ratio, spread
from seqlab.errors import ConfigError, nearest
from seqlab.kernels.recurrence import PLATFORM, RECURRENCES
from seqlab.plan.flops import products

FORWARD, BOTH = "forward", "forward and backward"
LEAST = 0.05  # seconds of a lap
YARDSTICK = "xla"
#: What shapes are unless fields are given; on an accelerator as large as the papers' own tables.
SMALL, LARGE = Shape(), Shape(8, 4096, 16, 128, 128)


class Program(NamedTuple):
    """A form of a case in one pass, compiled, and what it takes at the least."""

    which: str
    work: Work
    moved: int
    flops: int


def cases(family: str) -> list[Case]:
    """The uses of a family, or of "all"; raises ConfigError for one that is not there."""
    if family != "all" and family not in FAMILIES:
        raise ConfigError(f"There is no kernel family {family!r}: {nearest(family, FAMILIES)}")
    return [case for case in CASES if family in ("all", case.family)]


def shapes(fields: Iterable[str]) -> list[Shape]:
    """From "T=1024,4096" and the like: every combination."""
    plain = SMALL if jax.default_backend() == "cpu" else LARGE
    return combinations(plain, fields, "shape")


def forms(case: Case, asked: Sequence[str]) -> list[str]:
    """The forms of a case that run here, or those of them that are asked for. The definition, which
    keeps every token's state for its gradients, runs where it is asked for. Raises ConfigError for
    a form that the family lacks."""
    known = implementations(case.family)
    for name in asked:
        if name not in known:
            raise ConfigError(f"{case.family} has no form {name!r}: {nearest(name, known)}")
    backend = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    here = [name for name in known if PLATFORM.get(name, backend) == backend]
    return [name for name in here if name in (asked or {*known} - {"reference"})]


def measure(
    case: Case, shape: Shape, asked: Sequence[str], rounds: int, top: Ceilings
) -> list[Row]:
    """A row for every form and pass: times, and what they are against XLA's form and the device."""
    arrays = case.arrays(Draw(operands()), shape)
    sizes = settings.plain(shape)
    about = {
        "kernel": case.name,
        "size": " ".join(f"{name}{number}" for name, number in sizes.items()),
        **{"family": case.family, "variant": case.variant, **sizes},
    }
    passes = (FORWARD, BOTH) if case.learned else (FORWARD,)
    ways = {
        f"{form}, {which}": (form, which)
        for form, which in itertools.product(forms(case, asked), passes)
    }
    tell: Callable[[str], Row] = lambda name: {
        **about,
        **dict(zip(("form", "pass"), ways[name], strict=True)),
    }
    makers = {name: functools.partial(program, case, arrays, *way) for name, way in ways.items()}
    made, absent = gather(makers, tell)
    laps = race(top.works | {name: one.work for name, one in made.items()}, rounds, LEAST)
    return [tell(name) | _row(name, one, laps, top) for name, one in made.items()] + absent


def program(case: Case, arrays: tuple, form: str | None, which: str) -> Program:
    """`form` None is what the family takes by itself. Raises ConfigError where there is no memory
    for it, and what the form raises."""
    f, given = _traced(case, arrays, form, which)
    compiled = jax.jit(f).lower(*given).compile()
    machine.require(compiled)
    moved = size_of(given) + size_of(jax.eval_shape(f, *given))
    moved += size_of(arrays) if which == BOTH else 0
    counted, like = _traced(case, arrays, YARDSTICK, which)
    work = lambda: jax.block_until_ready(compiled(*given))
    return Program(which, work, moved, products(counted, *like))


def _traced(case: Case, arrays: tuple, form: str | None, which: str) -> tuple[Callable, tuple]:
    """The function to compile, and its arguments: with gradients, also the cotangent of y."""
    f = lambda *arrays: case.call(*arrays, implementation=form)
    if which == FORWARD:
        return f, arrays
    y = f if case.family not in RECURRENCES else lambda *arrays: f(*arrays)[0]

    def both(d_y, *arrays):
        def of(*learned):
            changed = dict(zip(case.learned, learned, strict=True))
            return y(*(changed.get(at, array) for at, array in enumerate(arrays)))

        result, pull = jax.vjp(of, *(arrays[at] for at in case.learned))
        return result, pull(d_y)

    d_y = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), jax.eval_shape(y, *arrays))
    return both, (d_y, *arrays)


def _row(name: str, one: Program, laps: dict[str, Laps], top: Ceilings) -> Row:
    seconds, yardstick = laps[name].seconds, laps.get(f"{YARDSTICK}, {one.which}")
    row = figure("ms", spread(1e3 * seconds))
    if yardstick is not None:
        row |= figure(f"against {YARDSTICK}", ratio(yardstick.seconds, seconds))
    row |= {"bytes": one.moved, **figure("GB/s", spread(one.moved / seconds / 1e9))}
    row |= figure("of the copy", top.of_copy(one.moved, laps, name))
    if one.flops:
        row |= {"operations": one.flops}
        row |= figure("GFLOP/s", spread(one.flops / seconds / 1e9))
        row |= figure("of the product", top.of_product(one.flops, laps, name))
    return row | top.row(laps)
