"""Numbers bent below a bound (Bello et al., 2017; scores and logits in Gemma 2)."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which is x where x is small and stays between -cap and cap; x if the cap
    is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
