"""What two implementations may differ by: `kernels.agreement`'s table, and the same for models."""

import jax
import numpy as np

from seqlab.kernels.agreement import FORWARD, GRADIENT, allowed, error, worst

__all__ = ["FORWARD", "GRADIENT", "allowed", "assert_close", "error", "worst"]

#: Another implementation of a whole model, float32: largest difference over largest logit.
LOGITS = 1e-4
#: The same in models that round activations to eight bits. A last bit decides to which side a
#: number next to a half falls, one of some hundred thousand, and what follows it differs by this.
ROUNDED_LOGITS = 5e-2


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
    for most, limit in ((np.median(wrong), LOGITS), (np.max(wrong), ROUNDED_LOGITS)):
        assert most <= limit, f"logits: error {most:.1e} of the largest, allowed {limit:.0e}"
