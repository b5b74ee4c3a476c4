"""Programs that run once or twice and so should compile quickly, however slowly they run."""

import functools
from collections.abc import Callable
from typing import Any

import jax

#: XLA's options for it on a CPU: a fifth of the time of the defaults. Results differ from those in
#: the last bits, because at level 0 a product is rounded before it is added to something.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def compiled(f: Callable, **options: Any) -> Callable:
    """jax.jit of `f`, compiled quickly where that can be chosen."""
    return jax.jit(f, compiler_options=_options(), **options)


@functools.cache
def _options() -> dict[str, Any] | None:
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=QUICK)()
    except jax.errors.JaxRuntimeError:  # an XLA that does not know one of them
        return None
    return QUICK
