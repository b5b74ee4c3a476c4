"""What softmax attention in a window leaves to be known when its weights meet others: scores that
stand beside those of its tokens, and the largest of them."""

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import widen
from seqlab.kernels.soft_cap import soft_cap
from seqlab.layers.ring import Ring

#: Multiplies scores until a softmax of them is a choice: in float32 two scores of about 10 that
#: differ at all are then 100 apart.
SHARP = 1e8


def with_logits(y: jax.Array, lse: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y [B, T, H, V] and log-sum-exp [B, T, H] of queries that see `logits` [n] too: further scores
    in the same softmax, whose values are zero (Nguyen et al., 2025, Lizard)."""
    more = jnp.logaddexp(lse, jax.nn.logsumexp(logits))
    return (jnp.exp(lse - more)[..., None] * widen(y)).astype(y.dtype), more


def largest_score(ring: Ring, q, k, kept, places, *, scale, cap, implementation) -> jax.Array:
    """The largest score of each query [B, T, H], float32 or wider; arguments as `Ring.attend` has
    them, `kept` of keys alone.

    It is the score of the key that a softmax chooses, and its gradient that of this score: the
    choice has none. Between keys of equal scores it is divided.
    """
    choice = jax.lax.stop_gradient
    chosen = (choice(kept), kept), places
    (nearest, _), _ = ring.attend(
        choice(q), choice(k), k, *chosen, scale=SHARP, implementation=implementation
    )
    return soft_cap(scale * jnp.sum(widen(q) * widen(nearest), -1), cap)
