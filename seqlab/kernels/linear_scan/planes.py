"""Complex numbers as two arrays of floats."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Complex(NamedTuple):
    """real + i imag, with the arithmetic that recurrences need.

    States hold floats only; and in XLA two planes are faster than a complex dtype, five times in a
    scan on a CPU.
    """

    real: jax.Array
    imag: jax.Array

    def __mul__(self, other: "Complex") -> "Complex":  # pyright: ignore
        return Complex(
            self.real * other.real - self.imag * other.imag,
            self.real * other.imag + self.imag * other.real,
        )

    def __add__(self, other: "Complex") -> "Complex":  # pyright: ignore
        return Complex(self.real + other.real, self.imag + other.imag)

    def conj(self) -> "Complex":
        """The complex conjugate, by the name that arrays give it."""
        return Complex(self.real, -self.imag)


def one_like(a: Any) -> Any:
    """1, in the shape of a real array or a Complex."""
    if isinstance(a, Complex):
        return Complex(jnp.ones_like(a.real), jnp.zeros_like(a.imag))
    return jnp.ones_like(a)
