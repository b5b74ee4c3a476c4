"""Weights of -1, 0 and 1, four to a byte, times activations of eight bits: exact, in integers.

What a token costs that is decoded alone is the reading of weights: an eighth of what bfloat16 is.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.errors import ConfigError, ModelError, nearest
from seqlab.kernels.on_gpu import trust
from seqlab.kernels.ternary_matmul import pallas_gpu, pallas_tpu
from seqlab.kernels.ternary_matmul.packing import rows, unpack


def ternary_matmul(
    x: jax.Array, packed: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """x W, where W [K, N] of -1, 0 and 1 is packed (see `packing.pack`).

    x       [..., K] int8
    packed  [K / 4, N] uint8, the first rounded up

    Returns [..., N] int32, exact for K < 2^24. `implementation` None is resolved when lowering: on
    a TPU or GPU, unless a mesh is to be filled by XLA, the kernel for it. Raises ConfigError for
    one that does not exist, and ModelError where x and W do not fit.
    """
    if x.dtype != jnp.int8 or packed.dtype != jnp.uint8 or packed.shape[0] != rows(x.shape[-1]):
        raise ModelError(
            f"ternary_matmul takes x [..., K] int8 and W [ceil(K / 4), N] uint8, not "
            f"{x.dtype}{list(x.shape)} and {packed.dtype}{list(packed.shape)}."
        )
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                f"ternary_matmul has no implementation {implementation!r}: "
                + nearest(implementation, IMPLEMENTATIONS)
            )
        return IMPLEMENTATIONS[implementation](x, packed)
    if _left_to_xla():
        return xla(x, packed)
    kernels = {}
    if pallas_tpu.suits(x.shape[-1]):
        kernels["tpu"] = pallas_tpu.ternary_matmul
    if trust.trusted("ternary_matmul", x.dtype):
        kernels["cuda"] = pallas_gpu.ternary_matmul
    return lax.platform_dependent(x, packed, default=xla, **kernels)


def reference(x: jax.Array, packed: jax.Array) -> jax.Array:
    """The definition."""
    K = x.shape[-1]
    return jnp.matmul(x.astype(jnp.int32), unpack(packed, K).astype(jnp.int32))


def xla(x: jax.Array, packed: jax.Array) -> jax.Array:
    """The same with products of int8, which processors have instructions for.

    On a CPU it saves memory, not time: for a single token, unpacking takes about as long as reading
    less saves.
    """
    W, contracted = unpack(packed, x.shape[-1]), (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, W, contracted, preferred_element_type=jnp.int32)


def _left_to_xla() -> bool:
    """Whether XLA divides the work over a mesh, which it cannot do with a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and not mesh.are_all_axes_manual


IMPLEMENTATIONS = {
    "reference": reference,
    "xla": xla,
    "pallas_tpu": pallas_tpu.ternary_matmul,
    "pallas_gpu": pallas_gpu.ternary_matmul,
}
