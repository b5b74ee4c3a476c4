"""The contract itself: pieces, states, causality, rows, packing, padding."""

import jax
import numpy as np

from seqlab.conformance.report import Finding, close, exactly, named, worst
from seqlab.conformance.trial import BATCH, Results, Trial

LARGE = np.float32(1e3)  # garbage this large goes where nothing must be read


def pieces_equal_the_whole(trial: Trial) -> Finding:
    """Token by token, in odd lengths and in pieces shorter than a chunk.

    Where a cut would fall into a prefix it waits for the first place that is in none.
    """
    T, odd, short = trial.length, trial.odd, trial.short
    expected = trial.run(trial.x, trial.state, trial.reset)
    cuts = {
        "token by token": [1] * T,
        "in odd lengths": [odd, 1, odd, T - 2 * odd - 1],
        "in short pieces": [short] * (T // short) + [1] * (T % short),
    }
    findings = [close(_in_pieces(trial, sizes), expected, f"{way}") for way, sizes in cuts.items()]
    return worst(findings, ", ".join([*cuts, *trial.adjusted]))


def state_shape_is_fixed(trial: Trial) -> Finding:
    """Shapes and dtypes are those of `init_state` for any T; rows first; float32, int or bool."""
    one, two = (named(Results((), trial.empty(batch))) for batch in (1, BATCH))
    wrong = [
        f"{name} is {_described(leaf)} for {BATCH} rows and {_described(one[name])} for 1"
        for name, leaf in two.items()
        if not _well_formed(leaf) or one[name].shape != (1, *leaf.shape[1:])
    ]
    for T in (1, 2, trial.odd, trial.length):
        wrong += _changes(trial, T)
    size = f"{trial.bytes_per_sequence():,} bytes per sequence"
    return Finding(float(len(wrong)), 0.0, wrong[0] if wrong else size)


def future_is_not_seen(trial: Trial) -> Finding:
    """Other tokens from t on leave every y before t the same, to the bit (t is in no prefix)."""
    expected, _ = trial.run(trial.x, trial.state, trial.reset)
    findings = []
    cuts = (1, 7, trial.odd, trial.half, trial.length - 1)
    for t in sorted({trial.legal(cut) for cut in cuts}):
        later = np.arange(trial.length)[:, None] >= t
        y, _ = trial.run(np.where(later, trial.other, trial.x), trial.state, trial.reset)
        before, wanted = np.asarray(y)[:, :t], np.asarray(expected)[:, :t]
        findings.append(exactly(before, wanted, f"y before token {t}, when it changes"))
    return worst(findings, "to the bit")


def rows_are_independent(trial: Trial) -> Finding:
    """A row alone gives what it gives in a batch, and other rows do not change it at all."""
    first = lambda tree: _rows(tree, slice(1))
    together = trial.run(trial.x, trial.state, trial.reset)
    alone = trial.run(trial.x[:1], first(trial.state), trial.reset[:1])
    x, reset = trial.x.copy(), trial.reset.copy()
    x[1:], reset[1:] = LARGE * trial.other[1:], False
    beside = trial.run(x, trial.state, reset)
    return worst(
        [
            close(first(together), alone, "a row in a batch and alone"),
            exactly(first(beside), first(together), "a row beside others"),
        ],
        "alone, and beside garbage",
    )


def packed_documents_equal_separate_ones(trial: Trial) -> Finding:
    """The first document goes on from the state, the two after it are one token long."""
    a, T = trial.odd, trial.length
    reset = np.zeros((BATCH, T), bool)
    reset[:, [a, a + 1, a + 2]] = True
    alone = [trial.run(trial.x[:, :a], trial.state)]
    alone += [trial.run(trial.x[:, t : t + 1]) for t in (a, a + 1)]
    alone += [trial.run(trial.x[:, a + 2 :])]
    expected = Results(np.concatenate([y for y, _ in alone], 1), alone[-1].state)
    found = close(trial.run(trial.x, trial.state, reset), expected, "packed")
    return worst([found], f"of {a}, 1, 1 and {T - a - 2} tokens")


def documents_do_not_leak(trial: Trial) -> Finding:
    """Changing a document, or the state, changes nothing after the next reset: exactly nothing."""
    findings = []
    for start in (1, trial.odd, trial.length - 1):
        reset = np.zeros((BATCH, trial.length), bool)
        reset[:, start] = True
        x = trial.x.copy()
        x[:, :start] = LARGE * trial.other[:, :start]
        actual, expected = trial.run(x, trial.state, reset), trial.run(trial.x, trial.state, reset)
        what = f"after a reset at token {start}, when the tokens before it change"
        findings.append(exactly(_from(start, actual), _from(start, expected), what))
    reset = np.zeros((BATCH, trial.length), bool)
    reset[:, 0] = True
    expected = trial.run(trial.x, reset=reset)
    for state in (trial.state, _scaled(trial.state)):
        actual = trial.run(trial.x, state, reset)
        findings.append(exactly(actual, expected, "the incoming state, past a reset at token 0"))
    return worst(findings, "to the bit, from garbage and from a state")


def left_padding_is_forgotten(trial: Trial) -> Finding:
    """Rows padded on the left, each by its own amount, give what they give alone."""
    starts = (trial.length - trial.odd, trial.length - trial.short)
    place, start_of = np.arange(trial.length), np.asarray(starts)[:, None]
    padding, reset = (place < start_of)[..., None], place == start_of
    zeros, garbage = (
        trial.run(np.where(padding, fill, trial.x), reset=reset)
        for fill in (np.float32(0), LARGE * trial.other)
    )
    findings = []
    for row, start in enumerate(starts):
        only = lambda tree: _rows(tree, slice(row, row + 1))
        padded, dirty = (_from(start, only(results)) for results in (zeros, garbage))
        alone = only(trial.run(trial.x[:, start:]))
        findings.append(exactly(dirty, padded, "garbage instead of zeros"))
        findings.append(close(padded, alone, "padded and alone"))
    return worst(findings, f"of {starts[0]} and {starts[1]} tokens")


def _in_pieces(trial: Trial, sizes: list[int]):
    ys, state, start = [], trial.state, 0
    for end in sorted({trial.legal(int(cut)) for cut in np.cumsum(sizes)}):
        piece = slice(start, end)
        y, state = trial.run(trial.x[:, piece], state, trial.reset[:, piece])
        ys.append(y)
        start = end
    return Results(np.concatenate(ys, 1), state)


def _from(start: int, results: Results) -> Results:
    return Results(np.asarray(results.y)[:, start:], results.state)


def _rows(tree, rows: slice):
    return jax.tree.map(lambda a: np.asarray(a)[rows], tree)


def _scaled(state):
    """A wilder state: its real numbers as large as garbage."""
    scale = lambda a: LARGE * np.asarray(a) if a.dtype == np.float32 else a
    return jax.tree.map(scale, state)


def _well_formed(leaf) -> bool:
    real = np.issubdtype(leaf.dtype, np.integer) or leaf.dtype.name in ("float32", "bool")
    return real and leaf.shape[:1] == (BATCH,)


def _changes(trial: Trial, T: int) -> list[str]:
    """What is not as `init_state` and x promise, after T tokens."""
    x, state = trial.x[:, :T], trial.empty()
    expected = named(Results(x, state))
    actual = named(trial.shapes(x, state, trial.reset[:, :T]))
    if actual.keys() != expected.keys():
        return [f"after {T} tokens the leaves are {sorted(actual)}, not {sorted(expected)}"]
    return [
        f"{name} is {_described(leaf)} after {T} tokens, not {_described(expected[name])}"
        for name, leaf in actual.items()
        if _described(leaf) != _described(expected[name])
    ]


def _described(a) -> str:
    return f"{a.dtype.name}{list(a.shape)}"
