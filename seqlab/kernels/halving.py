"""Decays of every channel between the tokens of a chunk, formed by products of numbers <= 1 only.

The decay from token j to a later token i acts inside a product over channels, so it must be split
into a factor for the one and a factor for the other, and both must stay <= 1. Cut the chunk in two
halves: for every pair across the border, split at the border. Then cut both halves, and so on down
to single tokens: each pair is split at the first border that comes between the two. No exponent is
positive and nothing is subtracted, so gates of any strength are exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import dot


class Border(NamedTuple):
    """Decays to and from the middles of n blocks of 2 s tokens: [B, H, n, s, K]."""

    after: jax.Array  # of the left half's tokens after j
    upto: jax.Array  # of the right half's tokens up to i


class Decays(NamedTuple):
    """All decays are <= 1; C is a power of two."""

    borders: tuple[Border, ...]  # s = 1, 2, ... C / 2
    before: jax.Array  # [B, H, C, K] from the chunk's first token up to i
    after: jax.Array  # [B, H, C, K] of the chunk's tokens after j
    whole: jax.Array  # [B, H, K] of all the chunk's tokens


def decays(log_decay: jax.Array) -> Decays:
    """log_decay [B, H, C, K]"""
    whole = jnp.exp(log_decay)
    before, after = whole[..., None, :], jnp.ones_like(whole)[..., None, :]  # [B, H, n, s, K]
    borders = []
    while whole.shape[2] > 1:
        (before_l, before_r), (after_l, after_r) = _halves(before), _halves(after)
        whole_l, whole_r = _halves(whole)
        borders.append(Border(after_l, before_r))
        before = jnp.concatenate([before_l, whole_l[..., None, :] * before_r], 3)
        after = jnp.concatenate([after_l * whole_r[..., None, :], after_r], 3)
        whole = whole_l * whole_r
    return Decays(tuple(borders), before[:, :, 0], after[:, :, 0], whole[:, :, 0])


def scores(decay: Decays, q: jax.Array, k: jax.Array, narrow) -> jax.Array:
    """q, k [B, H, C, K] -> A_ij = sum_k q_i k_j decay_ij for j <= i, else 0: [B, H, C, C].

    Operands of products are rounded to the dtype `narrow`, except for a token's score with itself.
    """
    A = jnp.sum(q * k, -1)[..., None, None]  # [B, H, n, s, s]
    for border in decay.borders:
        q_upto, k_after = _split(border, q, k, narrow)
        across = dot("bhnik,bhnjk->bhnij", q_upto, k_after)
        left, right = _halves(A)
        above = jnp.concatenate([left, jnp.zeros_like(across)], -1)
        A = jnp.concatenate([above, jnp.concatenate([across, right], -1)], -2)
    return A[:, :, 0]


def products(decay: Decays, dA: jax.Array, q: jax.Array, k: jax.Array, narrow):
    """row_i = sum_j dA_ij decay_ij k_j and col_j = sum_i dA_ij decay_ij q_i, over j < i."""
    dA = dA.astype(narrow)[:, :, None]
    row, col = jnp.zeros_like(q), jnp.zeros_like(k)
    for border in reversed(decay.borders):
        q_upto, k_after = _split(border, q, k, narrow)
        s = border.upto.shape[3]
        across = dA[..., s:, :s]
        here = border.upto * dot("bhnij,bhnjk->bhnik", across, k_after)
        row += jnp.stack([jnp.zeros_like(here), here], 3).reshape(row.shape)
        here = border.after * dot("bhnij,bhnik->bhnjk", across, q_upto)
        col += jnp.stack([here, jnp.zeros_like(here)], 3).reshape(col.shape)
        both = jnp.stack([dA[..., :s, :s], dA[..., s:, s:]], 3)
        dA = both.reshape(*both.shape[:2], -1, s, s)
    return row, col


def _split(border: Border, q, k, narrow):
    """Queries right of a border and keys left of it, decayed to the border."""
    n, s = border.upto.shape[2:4]
    blocks = lambda a: a.reshape(*a.shape[:2], n, 2, s, -1)
    q_upto, k_after = blocks(q)[:, :, :, 1] * border.upto, blocks(k)[:, :, :, 0] * border.after
    return q_upto.astype(narrow), k_after.astype(narrow)


def _halves(a):
    """[B, H, n, ...] -> the even and the odd ones of the n blocks"""
    a = a.reshape(*a.shape[:2], -1, 2, *a.shape[3:])
    return a[:, :, :, 0], a[:, :, :, 1]
