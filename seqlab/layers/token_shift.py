"""The token before: what a layer sees that mixes each token with its predecessor (RWKV)."""

import jax
import jax.numpy as jnp

from seqlab.parallel.halo import with_halo


def previous(x: jax.Array, last: jax.Array, reset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x_{t-1} of the same document, zero at its start: [B, T, D] in the dtype of x.

    last [B, D] is the token before x, reset [B, T] bool is true where a document starts. Returns
    the last token of x too, in the dtype of `last`.
    """
    return with_halo(_previous, lambda x, reset: x[:, -1], 1, (x, reset), last)


def _previous(x, reset, last):
    before = jnp.concatenate([last[:, None].astype(x.dtype), x[:, :-1]], 1)
    return jnp.where(reset[..., None], 0, before), x[:, -1].astype(last.dtype)
