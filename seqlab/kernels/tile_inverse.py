"""(I + M)^-1 for strictly lower triangular M, within a kernel: products of whole squares only.

Blocks of 8 by a Neumann series, which is exact there and too short for its powers to grow; then
blocks of 16, 32, ... of two inverses each, as [[A, 0], [C, B]]^-1 = [[A', 0], [-B' C A', B']].
Masks choose what takes part, so no block is smaller than the matrix unit. Products are float32: one
pass in bfloat16 diverges where writes overshoot (beta near 2).
"""

import jax.numpy as jnp

from seqlab.kernels.tiles import places, product

BLOCK = 8


def inverse(M):
    """M [C, C], of which only what lies below the diagonal is read; C a power of two from 8 on"""
    size = M.shape[0]
    i, j = places(size)
    M = jnp.where(i > j, M, 0)
    power = jnp.where(i // BLOCK == j // BLOCK, M, 0)
    X = jnp.where(i == j, 1, 0) - power
    for _ in range(2):  # I - M + M^2 - ... - M^7
        power = product(power, power)
        X += product(X, power)
    s = BLOCK
    while s < size:
        below = jnp.where((i // (2 * s) == j // (2 * s)) & (i // s != j // s), M, 0)
        X -= product(X, product(below, X))
        s *= 2
    return X
