"""Whether a GPU kernel is to be believed on the GPU at hand: it is tried before its first use.

Pallas' compiler is young, and GPUs differ. So a kernel that disagrees with the form in XLA on a few
small arrays, in its results or its gradients, or does not compile, is not used on that kind of GPU,
which is said once; the form in XLA runs in its place.
"""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.agreement import FORWARD, GRADIENT, allowed, worst


class Trial(NamedTuple):
    """kernel(*args) against xla(*args): what `read` takes of the results, and the gradients of it
    by all floating `args`."""

    kernel: Callable
    xla: Callable
    args: tuple
    read: Callable = lambda results: results


#: Of each GPU kernel by its name: dtype of the tokens -> its trial. A family enters its own.
TRIALS: dict[str, Callable[[Any], Trial]] = {}
#: The dtypes of tokens that each is used with.
DTYPES: dict[str, tuple[str, ...]] = {}


def trial_of(kernel: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Callable:
    """Enter the decorated function in TRIALS."""
    DTYPES[kernel] = dtypes
    return lambda trial: TRIALS.setdefault(kernel, trial)


def trusted(kernel: str, dtype) -> bool:
    """Whether the kernel may run on tokens of a dtype; it may be asked while a program is traced.

    Without a GPU there is nothing to try it on, and programs lowered for one take the kernel.
    """
    kind = gpu_kind()
    return kind is None or objection(kernel, kind, jnp.dtype(dtype).name) is None


def gpu_kind() -> str | None:
    """The kind of GPU that programs run on here; None if they run on none."""
    return jax.local_devices()[0].device_kind if jax.default_backend() == "gpu" else None


@functools.cache
def objection(kernel: str, kind: str, dtype: str) -> str | None:
    """What speaks against a kernel on this kind of GPU, which is the one here; None if nothing.

    Tried once in a process, in a thread of its own, which knows nothing of the program that is
    being traced, of its mesh or of its precision.
    """
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(_tried, TRIALS[kernel], dtype).result()
    if found is not None:
        logging.getLogger("seqlab").warning(
            f"The GPU kernel of {kernel} is not used for {dtype} on {kind}, where {found}: "
            "the form in XLA runs in its place."
        )
    return found


def _tried(trial: Callable[[Any], Trial], dtype: str) -> str | None:
    try:
        kernel, xla, args, read = trial(dtype)
        with jax.default_matmul_precision("highest"):  # of the form in XLA: kernels choose theirs
            actual, expected = (values_and_gradients(f, args, read) for f in (kernel, xla))
    except Exception as error:  # whatever a compiler raises, there is another form
        return f"it fails ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    rows = zip(("result", "gradient"), (FORWARD, GRADIENT), actual, expected, strict=True)
    for what, table, a, e in rows:
        wrong, path = worst(a, e)
        if wrong > (limit := allowed(dtype, table)):
            return f"its {what} {path} is off by {wrong:.1e}, allowed {limit:.0e}"
    return None


def values_and_gradients(
    f: Callable, args: tuple, read: Callable = lambda results: results
) -> tuple[Any, list]:
    """read(f(*args)), and what fixed cotangents of it give of each floating array in `args`."""
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, args))
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    floats = [a for a in leaves if is_float(a)]
    cotangent = lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape).astype(a.dtype)

    def of_floats(floats):
        given = iter(floats)
        return read(f(*tree.unflatten([next(given) if is_float(a) else a for a in leaves])))

    @jax.jit
    def both(floats):
        if not floats:
            return of_floats(floats), []
        results, pull = jax.vjp(of_floats, floats)
        return results, pull(jax.tree.map(cotangent, results))[0]

    return both(floats)
