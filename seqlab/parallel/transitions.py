"""What a stretch of tokens does to the state that enters it, as a callable pytree.

A chunk is a stretch; so is a device's shard of a sequence. Both use the same transitions: chunks
scan them on one device, `parallel.sequence` scans them over devices. Beside being called, one has

    then(later)        this stretch followed by a later one, as one transition
    cut(axis)          which of its arrays are to be cut along `axis` (counted from the end) so that
                       each part leads the same part of the state; None if the parts would mix
    turned(cotangent)  backwards in time: what takes the cotangent of the state that leaves to that
                       of the state that enters, where `cotangent` is added. It reads all arrays but
                       `update`. Where no gradient passes it is missing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Diagonal(NamedTuple):
    """state -> decay * state + update: every elementwise-gated linear recurrence.

    A stretch that starts a document has decay exactly 0.
    """

    decay: jax.Array
    update: jax.Array

    def __call__(self, state: jax.Array) -> jax.Array:
        return self.decay * state + self.update

    def then(self, later: "Diagonal") -> "Diagonal":
        """The transition of this stretch followed by `later`."""
        return Diagonal(later.decay * self.decay, later(self.update))

    def cut(self, axis: int):
        """Every array that differs along `axis`: numbers do not mix."""
        return differing(self, axis)

    def turned(self, cotangent) -> "Diagonal":
        """cotangent -> conj(decay) * cotangent + that of the state that enters."""
        return Diagonal(self.decay.conj(), cotangent)


class MaxPlus(NamedTuple):
    """state -> max(state + shift, floor): Diagonal, with max for + and + for *.

    A stretch that starts a document has shift -inf. No gradient passes.
    """

    shift: jax.Array
    floor: jax.Array

    def __call__(self, state: jax.Array) -> jax.Array:
        return jnp.maximum(state + self.shift, self.floor)

    def then(self, later: "MaxPlus") -> "MaxPlus":
        """The transition of this stretch followed by `later`."""
        return MaxPlus(self.shift + later.shift, later(self.floor))

    def cut(self, axis: int):
        """Every array that differs along `axis`: numbers do not mix."""
        return differing(self, axis)


class Matrix(NamedTuple):
    """state -> matrix @ state + update: recurrences that read the state and write it back, such as
    the delta rule.

    matrix [..., K, K], update [..., K, V]. Products are never rounded to less than float32: a chain
    of them is as long as there are chunks and devices.
    """

    matrix: jax.Array
    update: jax.Array

    def __call__(self, state: jax.Array) -> jax.Array:
        return _exact(self.matrix, state) + self.update

    def then(self, later: "Matrix") -> "Matrix":
        """The transition of this stretch followed by `later`."""
        return Matrix(_exact(later.matrix, self.matrix), later(self.update))

    def cut(self, axis: int):
        """Columns of the state pass through one matrix; rows mix."""
        if axis == -2:
            return None
        cut = differing(self, axis)
        return cut if axis < -2 else cut._replace(matrix=False)

    def turned(self, cotangent) -> "Matrix":
        """cotangent -> matrix^T @ cotangent + that of the state that enters."""
        return Matrix(self.matrix.mT, cotangent)


def compose(stretches):
    """One transition for many, stacked along the leading axis in order of time."""
    first = jax.tree.map(lambda a: a[0], stretches)
    # a decay shared by all channels would change shape when composed with one that is not
    first = jax.tree.map(lambda a, r: jnp.broadcast_to(a, r.shape[1:]), first, stretches)
    count = len(jax.tree.leaves(stretches)[0])

    def step(before, stretch):
        number, later = stretch  # all of them: without the first they would be copied
        joined = jax.tree.map(lambda b, j: jnp.where(number, j, b), before, before.then(later))
        return joined, None

    return lax.scan(step, first, (jnp.arange(count) > 0, stretches))[0]


def differing(tree: Any, axis: int) -> Any:
    """Which arrays have more than one number along `axis`, counted from the end."""
    return jax.tree.map(lambda a: a.ndim >= -axis and a.shape[axis] > 1, tree)


def _exact(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
