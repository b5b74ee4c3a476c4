"""Who sees whom: the one mask of softmax attention, token by token and block by block."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # the score of a key that is not visible, set before any exp
EMPTY = MASKED / 2  # log-sum-exp of a query that sees nothing: exp(MASKED - EMPTY) is exactly 0
FAR = 2**30


def visible(q_position, q_document, k_position, k_document, window, sinks, causal=True):
    """Broadcasting: [..., T, 1] queries against [..., 1, S] keys -> bool [..., T, S]."""
    same = (q_document == k_document) & (k_document >= 0)
    if causal:
        same &= k_position <= q_position
    if window is None:
        return same
    apart = q_position - k_position
    return same & (((apart if causal else abs(apart)) < window) | (k_position < sinks))


def visible_blocks(q_at: jax.Array, k_at: jax.Array, window: int | None, sinks: int, causal=True):
    """Two of [N, M]: blocks in which some query may see some key, and in which every one sees all.

    q_at [2, N, B, C], k_at [2, M, B, C]: position and document of each token. Decided from the
    extent of each block, so the cost is that of N * M numbers, not of T * S: no block that is seen
    is missed, and those that need no mask are known.
    """
    (q_first, q_from), (q_last, q_to) = (a[:, :, None] for a in _extent(q_at))  # [2, N, 1, B]
    (k_first, k_from), (k_last, k_to) = (a[:, None] for a in _extent(k_at))  # [2, 1, M, B]
    some = (k_from <= q_to) & (q_from <= k_to)
    filled = jnp.all(q_at[1] >= 0, -1)[:, None] & jnp.all(k_at[1] >= 0, -1)
    every = filled & (q_from == q_to) & (k_from == k_to) & (q_from == k_from)
    nearest, farthest = q_first - k_last, q_last - k_first
    if causal:
        some &= k_first <= q_last
        every &= k_last <= q_first
    else:
        nearest, farthest = jnp.maximum(nearest, -farthest), jnp.maximum(farthest, -nearest)
    if window is not None:
        some &= (nearest < window) | (k_first < sinks)
        every &= (farthest < window) | (k_last < sinks)
    return jnp.any(some, -1), jnp.all(every, -1)


def _extent(at):
    """Smallest and largest position and document of each block's tokens: two of [2, N, B]."""
    token = at[1] >= 0
    return jnp.min(jnp.where(token, at, FAR), -1), jnp.max(jnp.where(token, at, -FAR), -1)
