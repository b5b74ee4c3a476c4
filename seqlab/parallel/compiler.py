"""What XLA must be told so that states travel while a device computes."""

import jax

#: Only both together let a TPU's scheduler run collectives beside computation on every generation.
TPU: dict[str, str | bool] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}


def options() -> dict[str, str | bool]:
    """Compiler options of programs that run on this machine's devices."""
    return TPU if jax.default_backend() == "tpu" else {}
