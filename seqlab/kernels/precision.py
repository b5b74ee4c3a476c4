"""Where numbers must not be rounded: states, gates, cumulative decays and reductions."""

import jax
import jax.numpy as jnp


def widen(a: jax.Array) -> jax.Array:
    """A floating array as float32; one in float64 stays so, because proofs run in float64."""
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum of two operands that may be narrow, summed and returned in float32 (or wider)."""
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    product = lambda a, b: jnp.einsum(equation, a, b, preferred_element_type=wide)
    if wide in (a.dtype, b.dtype):
        return product(a, b)
    # XLA's CPU runtime lacks some narrow products with wide sums
    on_cpu = lambda a, b: jnp.einsum(equation, a.astype(wide), b.astype(wide))
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=product)


@jax.custom_jvp
def bounded_sqrt(x: jax.Array) -> jax.Array:
    """sqrt(x), its slope at most 1000, so that gradients are finite at 0 (De et al., 2024)."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_slope(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx * jax.lax.rsqrt(jnp.maximum(4 * x, 1e-6))


def total(a: jax.Array) -> jax.Array:
    """The sum of a [..., X] along its last axis, never rounded to less than its dtype.

    As a product: inside a scan, XLA on a CPU fuses such a sum into what follows it, number by
    number, which was seen to take ten times as long.
    """
    return jnp.matmul(a, jnp.ones(a.shape[-1], a.dtype), precision=jax.lax.Precision.HIGHEST)
