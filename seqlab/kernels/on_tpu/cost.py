"""What a kernel costs at least, for the compiler's scheduler and for `seqlab plan`."""

import math
from collections.abc import Callable, Iterator

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import Jaxpr, JaxprEqn

from seqlab.kernels.on_tpu.tiles import LANES

PASSES = 6  # in bfloat16, of a product whose operands are not rounded


def estimate(f: Callable, tiles: list, times: int, moved: list) -> pl.CostEstimate:
    """Of `times` calls of f(*tiles), where each of the arrays `moved` is read or written once.

    Products count as what a matrix unit is busy with: with whole blocks of 128 columns, and once
    for every pass.
    """
    return pl.CostEstimate(
        flops=times * sum(map(_products, _equations(jax.make_jaxpr(f)(*tiles).jaxpr))),
        transcendentals=times * pl.estimate_cost(f, *tiles).transcendentals,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved),
    )


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        inner = eqn.params.get("jaxpr")
        if inner is not None:
            yield from _equations(getattr(inner, "jaxpr", inner))


def _products(eqn: JaxprEqn) -> int:
    if eqn.primitive is not lax.dot_general_p:
        return 0
    (over, _), _ = eqn.params["dimension_numbers"]
    a, b = (v.aval for v in eqn.invars)
    summed = math.prod(a.shape[axis] for axis in over)  # pyright: ignore
    whole = lambda n: -(-n // LANES) * LANES  # fewer take as long
    rows, columns = a.size // summed, b.size // summed  # pyright: ignore
    passes = 1 if eqn.params["precision"] is None else PASSES
    return 2 * rows * whole(summed) * whole(columns) * passes
