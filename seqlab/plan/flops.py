"""How many floating-point operations the products in a traced program take."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from seqlab.models.parameters import bind, parameters
from seqlab.train.config import Config
from seqlab.train.corpus import Batch
from seqlab.train.step import loss


def products(f: Callable, *args: Any) -> int:
    """Of one call: 2 a multiplication and addition, loops as often as they run. Of a conditional's
    branches, which forms for several platforms are too, the largest counts; elementwise work does
    not."""
    return _of(jax.make_jaxpr(f)(*args).jaxpr)


def forward(config: Config) -> int:
    """Of one batch's loss, over all devices."""
    model = config.model.skeleton()
    row: Any = jax.ShapeDtypeStruct((config.data.batch, config.data.length + 1), jnp.int32)
    nats = lambda params, batch: loss(bind(model, params), batch).nats
    return products(nats, parameters(model), Batch(row, row))


def _of(jaxpr: Jaxpr) -> int:
    return sum(map(_equation, jaxpr.eqns))


def _equation(equation) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        inner = math.prod(left[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    inside = [_of(jaxpr) for value in equation.params.values() for jaxpr in _jaxprs(value)]
    if equation.primitive.name == "cond":
        return max(inside)
    return equation.params.get("length", 1) * sum(inside) if inside else 0


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [j for v in value for j in _jaxprs(v)] if isinstance(value, tuple | list) else []
