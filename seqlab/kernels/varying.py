"""How the operands and results of a kernel are typed inside of a shard: all in one way."""

import jax
from jax import lax


def alike(arrays, results) -> tuple[list, list]:
    """Arrays, typed as differing along every mesh axis along which one of them does; and shapes of
    results, typed the same."""
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    arrays = [_along(a, varying) for a in arrays]
    kind = jax.typeof(arrays[0]).manual_axis_type
    typed = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=kind)
    return arrays, [typed(s) for s in results]


def _along(a, axes):
    new = tuple(axes - jax.typeof(a).manual_axis_type.varying)
    return lax.pcast(a, new, to="varying") if new else a
