"""Where numbers must not be rounded: states, gates, cumulative decays and reductions."""

import jax
import jax.numpy as jnp


def widen(a: jax.Array) -> jax.Array:
    """A floating array as float32, or as float64 where it is one already (proofs run in float64)."""
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))
