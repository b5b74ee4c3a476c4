"""What the device itself reaches, measured beside what is held against it: a copy and a product."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.bench.timing import Laps, Spread, Work, figure, spread

COPY, PRODUCT = "copy", "product"  # names of the two contestants


class Ceilings(NamedTuple):
    """An array that is read and written once, and a square product of operands of `dtype`."""

    works: dict[str, Work]
    bytes: int
    flops: int
    dtype: str

    def of_copy(self, moved: int, laps: dict[str, Laps], name: str) -> Spread:
        """The bytes a second of a contestant that moves so many, as a part of the copy's."""
        return spread(moved / self.bytes * laps[COPY].seconds / laps[name].seconds)

    def of_product(self, flops: int, laps: dict[str, Laps], name: str) -> Spread:
        """The operations a second of one that takes so many, as a part of the product's."""
        return spread(flops / self.flops * laps[PRODUCT].seconds / laps[name].seconds)

    def row(self, laps: dict[str, Laps]) -> dict[str, Any]:
        rate = lambda amount, name: spread(amount / laps[name].seconds / 1e9)
        return {
            "copy bytes": self.bytes,
            **figure("copy GB/s", rate(self.bytes, COPY)),
            "product": self.dtype,
            **figure("product GFLOP/s", rate(self.flops, PRODUCT)),
        }


def operands() -> Any:
    """The dtype that models compute in here."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def ceilings(megabytes: int = 256, width: int | None = None) -> Ceilings:
    """A copy of an array of so many megabytes, larger than caches, and a product of two matrices of
    this width (2048 on a CPU, 8192 elsewhere)."""
    width = width or (2048 if jax.default_backend() == "cpu" else 8192)
    dtype = operands()
    source = jnp.zeros(megabytes * 2**20 // 4, jnp.float32)
    matrix = jnp.ones((width, width), dtype)
    copy, product = jax.jit(lambda a: a + 1), jax.jit(lambda a: a @ a)
    works: dict[str, Work] = {
        COPY: lambda: copy(source).block_until_ready(),
        PRODUCT: lambda: product(matrix).block_until_ready(),
    }
    return Ceilings(works, 2 * source.nbytes, 2 * width**3, jnp.dtype(dtype).name)
