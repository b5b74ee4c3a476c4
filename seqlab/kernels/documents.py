"""Which tokens of a chunk see which, when documents start inside it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Documents(NamedTuple):
    sees: jax.Array  # [B, C, C] query i sees key j: same document, j <= i
    enters: jax.Array  # [B, C] the token belongs to the document that enters the chunk
    leaves: jax.Array  # [B, C] the token belongs to the document that leaves the chunk
    passes: jax.Array  # [B] the document that enters is the one that leaves


def documents(reset: jax.Array) -> Documents:
    """reset [B, C] bool"""
    number = jnp.cumsum(reset, 1)  # 0 is the document that enters
    same = number[:, :, None] == number[:, None, :]
    return Documents(
        sees=same & jnp.tri(reset.shape[1], dtype=bool),
        enters=number == 0,
        leaves=number == number[:, -1:],
        passes=number[:, -1] == 0,
    )


def gate_gradient(docs: Documents, pairs, writes, passes):
    """The cotangent of the log decays [B, C, ...], from what each decay acts on.

    pairs   [B, C, ...] what reaches the cumulative decay through scores of two different tokens
            and through reads of the state that enters: collected from later tokens
    writes  [B, C, ...] what reaches it through the token's write to the state that leaves:
            collected from earlier tokens
    passes  [B, ...] what reaches it through the state that passes

    A token's own score and write do not decay, and must not be in it: they would cancel, but only
    up to rounding, which under strong decay is more than the gradient itself. Sums stop at the
    borders of documents, so nothing of one reaches another.
    """
    sees = docs.sees.astype(pairs.dtype)
    before = sees * (1 - jnp.eye(sees.shape[1], dtype=sees.dtype))
    exact = jax.lax.Precision.HIGHEST  # terms that nearly cancel; accelerators round by default
    later = jnp.einsum("bij,bi...->bj...", sees, pairs, precision=exact)
    earlier = jnp.einsum("bij,bj...->bi...", before, writes, precision=exact)
    return later + earlier + passes[:, None]
