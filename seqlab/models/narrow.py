"""Weights narrower than what is computed with, read a part at a time.

XLA on a CPU slices no bfloat16: it makes float32 of the whole array first, and that before a loop
whose steps slice it, so that memory would hold a model of bfloat16 three times. Integers it slices
as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

#: From an array and a place to the part of it that is there.
Take = Callable[[jax.Array, jax.Array], jax.Array]


def is_narrow(array: jax.Array, dtype: Any) -> bool:
    """Whether its numbers become wider where they are computed with in this dtype."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return floating and array.dtype.itemsize < jnp.dtype(dtype).itemsize


def read(take: Take, array: jax.Array, at: jax.Array, dtype: Any) -> jax.Array:
    """`take(array, at)`, which only rearranges, for use in this dtype."""
    part = take(array, at)
    return _read(take, part, array, at) if is_narrow(array, dtype) else part


def period(parts: Any, stacks: Any, index: jax.Array, dtype: Any) -> Any:
    """The arrays of one period of stacks, which a scan hands out as `parts`."""
    one = lambda stack, i: lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)
    read = lambda part, stack: _read(one, part, stack, index) if is_narrow(part, dtype) else part
    return jax.tree.map(read, parts, stacks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _read(take: Take, part: jax.Array, array: jax.Array, at: jax.Array) -> jax.Array:
    """The part, read from the array; its gradient goes where that of `part` does."""
    array, at = lax.optimization_barrier((array, at))  # which keeps the bits from being copied
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return lax.bitcast_convert_type(take(bits, at), part.dtype)


def _tangent(take: Take, primals, tangents):
    return _read(take, *primals), tangents[0]


_read.defjvp(_tangent, symbolic_zeros=True)
