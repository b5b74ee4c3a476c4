"""How close is close: one table. An error is rms(actual - expected) / rms(expected), leaf by leaf.

Loosening a number needs its reason in the commit that does it.
"""

import jax
import jax.numpy as jnp
import numpy as np

FORWARD = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
GRADIENT = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 3e-2}

#: Another implementation of a whole model, float32: largest difference over largest logit.
LOGITS = 1e-4
#: The same in models that round activations to eight bits. A last bit decides to which side a
#: number next to a half falls, one of some hundred thousand, and what follows it differs by this.
ROUNDED_LOGITS = 5e-2

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


def assert_close(actual, expected, table: dict[str, float] = FORWARD) -> None:
    """Every leaf of `actual` within the table's tolerance for its dtype."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        wrong, limit = error(a, e), allowed(a.dtype, table)
        assert wrong <= limit, (
            f"{jax.tree_util.keystr(path)}: error {wrong:.1e}, allowed {limit:.0e}"
        )


def assert_same_logits(actual, expected) -> None:
    """Within `LOGITS` of what another implementation of a model returned."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wrong = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
    assert wrong <= LOGITS, f"logits: error {wrong:.1e} of the largest, allowed {LOGITS:.0e}"


def assert_same_rounded_logits(actual, expected) -> None:
    """The same of a model that rounds activations, for logits [B, T, vocab]: within `LOGITS` at
    half of the tokens at least, and at the others within `ROUNDED_LOGITS`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wrong = np.max(np.abs(actual - expected), -1) / np.max(np.abs(expected))
    for error, limit in ((np.median(wrong), LOGITS), (np.max(wrong), ROUNDED_LOGITS)):
        assert error <= limit, f"logits: error {error:.1e} of the largest, allowed {limit:.0e}"
