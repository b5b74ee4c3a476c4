"""What a check found: one row a property, as data, as text and as a table."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from seqlab.conformance import tolerance

VERDICT = {True: "pass", False: "FAIL", None: "skip"}
COLOUR = {True: "green", False: "bold red", None: "yellow"}


class Finding(NamedTuple):
    """One comparison: how far off, how far it may be, and where that was.

    A property that cannot be tried here has no error: its finding is skipped, and `note` says why.
    """

    error: float | None
    allowed: float | None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        if self.error is None or self.allowed is None:
            return None
        return bool(self.error <= self.allowed)

    @property
    def excess(self) -> float:
        """The error in units of what is allowed; infinite where it had to be exact."""
        if self.error is None or self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else float("inf")


@dataclasses.dataclass(frozen=True)
class Row:
    """One property of one mixer. `passed` is None where it was skipped, and `note` says why."""

    property: str
    passed: bool | None
    error: float | None
    allowed: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Every property of one mixer."""

    mixer: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed; skipped rows do not count."""
        return all(row.passed is not False for row in self.rows)

    def row(self, name: str) -> Row:
        """The row of the property called `name`."""
        return next(row for row in self.rows if row.property == name)

    def table(self) -> Table:
        """For a terminal: `rich.print(report.table())`."""
        table = Table(title=self._verdict())
        for heading in ("property", "verdict", "worst error", "allowed", "note"):
            table.add_column(heading, no_wrap=heading in ("verdict", "worst error", "allowed"))
        for row in self.rows:
            verdict = f"[{COLOUR[row.passed]}]{VERDICT[row.passed]}[/]"
            note = row.note.replace("[", r"\[")
            table.add_row(row.property, verdict, number(row.error), number(row.allowed), note)
        return table

    def __str__(self) -> str:
        lines = [
            f"{VERDICT[row.passed]}  {row.property:<42}"
            f"{number(row.error):>9} {number(row.allowed):>9}  {row.note}".rstrip()
            for row in self.rows
        ]
        return "\n".join([self._verdict(), *lines])

    def _verdict(self) -> str:
        wrong = sum(row.passed is False for row in self.rows)
        skipped = sum(row.passed is None for row in self.rows)
        verdict = (
            f"{wrong} of {len(self.rows)} properties FAIL" if wrong else "every property holds"
        )
        return f"{self.mixer}: {verdict}" + (f" ({skipped} skipped)" if skipped else "")


def number(value: float | None) -> str:
    """An error for reading: `0`, `1.2e-07`, `inf`, or nothing."""
    if value is None:
        return ""
    return f"{value:g}" if value < 1000 and value.is_integer() else f"{value:.1e}"


def named(tree) -> dict[str, jax.Array]:
    """The leaves of a tree by the path a reader would write: `state.conv.inputs`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path).removesuffix(".value"): leaf for path, leaf in leaves}


def close(actual, expected, what: str, table=tolerance.FORWARD, dtype=None) -> Finding:
    """The leaf furthest outside the table's tolerance for its dtype (real leaves: for `dtype`)."""
    actual, expected = named(actual), named(expected)
    if actual.keys() != expected.keys():
        return Finding(float("inf"), 0.0, f"{what}: {sorted(actual)} is not {sorted(expected)}")
    return worst(
        Finding(
            tolerance.error(leaf, expected[name]),
            tolerance.allowed(_real(leaf.dtype, dtype), table),
            f"{what}: {name}",
        )
        for name, leaf in actual.items()
    )


def exactly(actual, expected, what: str) -> Finding:
    """The largest difference between two trees, none of which is allowed."""
    expected = named(expected)
    return worst(
        Finding(_difference(leaf, expected[name]), 0.0, f"{what}: {name}".rstrip(": "))
        for name, leaf in named(actual).items()
    )


def worst(findings: Iterable[Finding], note: str = "") -> Finding:
    """The worst of several findings; `note` speaks where all of them passed."""
    findings = list(findings)
    failed = [f for f in findings if f.passed is False]
    # among the failed, the exact ones are all infinitely wrong: the larger error decides
    found = max(failed or findings, key=lambda f: (f.excess, f.error or 0.0))
    return found if failed else found._replace(note=note)


def _real(own, given):
    return given if given is not None and jnp.issubdtype(own, jnp.floating) else own


def _difference(actual, expected) -> float:
    a, e = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    if not (np.isfinite(a).all() and np.isfinite(e).all()):
        return float("inf")
    return float(np.max(np.abs(a - e), initial=0.0))
