"""Solving (I + M) X = R for strictly lower triangular M: what couples the writes of a delta rule.

Forward substitution, by rows inside blocks of 16 and by blocks between them. A Neumann series is
fewer steps, but on equal keys its powers of M grow far beyond the solution and cancel; substitution
stays near rounding even where every write overshoots (beta up to 2). Products are never rounded to
less than float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 16


class UnitLower:
    """I + M, for M [..., C, C] of which only what lies below the diagonal is read; C % 16 == 0."""

    def __init__(self, M: jax.Array):
        C = M.shape[-1]
        self.M, self.borders = M, range(0, C, BLOCK)
        own = jnp.stack([M[..., s : s + BLOCK, s : s + BLOCK] for s in self.borders], -3)
        self.inverses = _invert(jnp.tril(own, -1))

    def solve(self, R: jax.Array) -> jax.Array:
        """(I + M)^-1 R, for R [..., C, V]"""
        return jnp.concatenate(self._substitute(self.M, self.inverses, R, self.borders), -2)

    def solve_transposed(self, R: jax.Array) -> jax.Array:
        """(I + M)^-T R, for R [..., C, V]"""
        X = self._substitute(self.M.mT, self.inverses.mT, R, self.borders[::-1])
        return jnp.concatenate(X[::-1], -2)

    def _substitute(self, M, inverses, R, borders):
        """The blocks of X, in the order in which each needs only those before it."""
        X = []
        for s in borders:
            rest = R[..., s : s + BLOCK, :]
            for t, x in zip(borders, X, strict=False):
                rest -= _dot(M[..., s : s + BLOCK, t : t + BLOCK], x)
            X.append(_dot(inverses[..., s // BLOCK, :, :], rest))
        return X


def _invert(M: jax.Array) -> jax.Array:
    """(I + M)^-1 for strictly lower triangular M [..., 16, 16], row after row"""
    eye = jnp.eye(BLOCK, dtype=M.dtype)

    def row(i, X):
        known = _dot(lax.dynamic_index_in_dim(M, i, -2), X)[..., 0, :]
        return lax.dynamic_update_index_in_dim(X, eye[i] - known, i, -2)

    return lax.fori_loop(2, BLOCK, row, eye - M)  # the first two rows are right from the start


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
