"""compare.html: what came out, on one page that opens offline, with its pictures and numbers."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from seqlab import settings
from seqlab.compare import pictures, published
from seqlab.compare.results import Result
from seqlab.tasks import Protocol
from seqlab.train import page, readable
from seqlab.train.folder import put
from seqlab.train.page import text


def write(
    out: pathlib.Path, found: Sequence[Result], name: str, protocol: Protocol, facts: Mapping
) -> pathlib.Path:
    """Write compare.html, its PNGs and results.json from finished results; the path of the page.

    `facts` is what else is worth knowing, by name: text or numbers.
    """
    ordered = sorted(found, key=lambda r: (-_rank(r.accuracy), r.state_bytes))
    tests = [label for label, _, _ in sorted(protocol.test, key=lambda test: test[1].length)]
    known = published.points(name)
    trained = [label for label, task, _ in protocol.test if task in dict(protocol.train)]
    drawn = pictures.draw(out, ordered, tests, known, trained)
    best = ordered[0]
    tiles = [
        ("Best mean accuracy", _number(best.accuracy), best.label),
        ("Its state", readable.size(best.state_bytes), ""),
        ("Compared", f"{len(ordered)}", "" if len(ordered) > 1 else "nothing beside it yet"),
        ("Time", readable.duration(sum(run.seconds for r in ordered for run in r.runs)), "in all"),
    ]
    sections = [
        page.tiles_grid(tiles),
        page.charts_grid([page.picture(p.name, p.alt, p.size) for p in drawn]),
        page.section("Results", _table(ordered, tests)),
        page.section("Terms", page.facts_list(_terms(protocol) | dict(facts))),
        page.section("Published", page.facts_list(_sources(known))) if known else "",
        '<footer>All figures are from <a href="results.json">results.json</a>.</footer>',
    ]
    put(out / "compare.html", page.document("Comparison", name, sections))
    rows = [settings.plain(result) for result in ordered]
    put(out / "results.json", json.dumps(rows, indent=1) + "\n")
    return out / "compare.html"


def _table(found: Sequence[Result], tests: Sequence[str]) -> str:
    several = len({result.width for result in found}) > 1
    head = [
        "Mixer",
        *(["Width"] if several else []),
        "Parameters",
        "State",
        "Steps",
        "Rate",
        "Loss",
    ]
    head += [*tests, "Mean", "Seconds"]
    rows = "".join(f"<tr>{_row(result, tests, several)}</tr>\n" for result in found)
    names = f"<th>{head[0]}</th>" + "".join(f'<th class="n">{text(h)}</th>' for h in head[1:])
    return (
        '<div class="card scroll"><table>\n'
        f"<thead><tr>{names}</tr></thead>\n<tbody>{rows}</tbody>\n</table></div>"
    )


def _row(result: Result, tests: Sequence[str], several: bool) -> str:
    best = result.best[0]
    cells = [
        *([f"{result.width:,}"] if several else []),
        f"{result.parameters:,}",
        readable.size(result.state_bytes),
        f"{best.steps:,}",
        f"{best.lr:.2g}",
        f"diverged at {best.diverged:,}" if best.diverged is not None else _number(best.loss),
        *(_number(result.test(test).mean) for test in tests),
        f"<b>{_number(result.accuracy)}</b>",
        f"{sum(run.seconds for run in result.runs):,.0f}",
    ]
    return f"<td>{text(result.label)}</td>" + "".join(
        f'<td class="n">{cell}</td>' for cell in cells
    )


def _terms(protocol: Protocol) -> dict[str, Any]:
    """What every entry was trained and tested on."""
    told = lambda task, count: f"{count:,} x {task!r}"
    return {
        "Trained on": "; ".join(told(task, count) for task, count in protocol.train),
        "Tested on": "; ".join(f"{label}: {told(t, n)}" for label, t, n in protocol.test),
        "Batch": protocol.batch,
        "Weight decay": protocol.weight_decay,
        "Layers": protocol.layers,
        "Accuracy": "the mean over examples of the share of their labels met",
    }


def _sources(known: Sequence[published.Published]) -> dict[str, str]:
    return {f"By {group.against}": f"{group.source}: {group.setting}" for group in known}


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _rank(accuracy: float) -> float:
    return accuracy if math.isfinite(accuracy) else -1.0
