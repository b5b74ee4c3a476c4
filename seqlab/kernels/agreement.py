"""How close is close: one table. An error is rms(actual - expected) / rms(expected), leaf by leaf.

Loosening a number needs its reason in the commit that does it.
"""

import jax
import jax.numpy as jnp
import numpy as np

FORWARD = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
GRADIENT = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 3e-2}

SMALLEST_SCALE = 1e-3  # below this rms an expected value counts as zero: errors become absolute


def error(actual, expected) -> float:
    """The relative rms error of one array; inf if anything in it is not finite."""
    a, e = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    if a.shape != e.shape:
        raise AssertionError(f"shapes differ: {a.shape} and {e.shape}")
    if not np.isfinite(a).all():
        return float("inf")
    if a.size == 0:
        return 0.0
    return float(np.sqrt(np.mean((a - e) ** 2)) / max(np.sqrt(np.mean(e**2)), SMALLEST_SCALE))


def worst(actual, expected) -> tuple[float, str]:
    """The largest `error` over two trees of the same structure, and the path of its leaf."""
    actual, expected = (jax.tree_util.tree_leaves_with_path(t) for t in (actual, expected))
    assert len(actual) == len(expected), (len(actual), len(expected))
    errors = [
        (error(a, e), jax.tree_util.keystr(path))
        for (path, a), (_, e) in zip(actual, expected, strict=True)
    ]
    return max(errors, default=(0.0, ""))


def allowed(dtype, table: dict[str, float] = FORWARD) -> float:
    """The table's entry for a dtype; integers and booleans must be equal."""
    return table[jnp.dtype(dtype).name] if jnp.issubdtype(dtype, jnp.floating) else 0.0
