"""What a linearization reached: as a sentence, as a table on a terminal, and as report.html."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from seqlab.linearize import pictures
from seqlab.linearize.pictures import Line
from seqlab.linearize.recipes import METHODS
from seqlab.linearize.record import BASELINE, FILE, SWAP, TEACHER, Figures, Record
from seqlab.train import metrics, page, readable
from seqlab.train.folder import put
from seqlab.train.page import text

NAMES = {TEACHER: "teacher", SWAP: "at the swap", BASELINE: "window and sinks"}
DASH = "–"


def recovered(record: Record, found: Figures) -> float:
    """The teacher's perplexity over a student's: 1 is all of it."""
    return math.exp(record.figures[TEACHER].loss - found.loss)


def closed(record: Record, found: Figures) -> float | None:
    """Which share of the nats that the swap cost has been won back; None where it cost none."""
    teacher, swap = record.figures[TEACHER].loss, record.figures[SWAP].loss
    return (swap - found.loss) / (swap - teacher) if swap > teacher else None


def label(name: str) -> str:
    """A row's name for a reader: "1-layer" is "stage 1, layer"."""
    number, _, loss = name.partition("-")
    return NAMES.get(name) or f"stage {number}, {loss}"


def sentence(record: Record, name: str) -> str:
    """What was measured under a name, in one line."""
    found = record.figures[name]
    line = f"{label(name)}: perplexity {found.perplexity:#.4g}"
    return line if name == TEACHER else f"{line}, {recovered(record, found):.1%} recovered"


def rows(record: Record) -> list[list[str]]:
    """The head of a table of all figures, and its rows: what was not trained first."""
    held = record.figures[TEACHER].recall  # what the teacher cannot hold, nobody can have kept
    distances = sorted(distance for distance, share in held.items() if share is not None)
    head = ["", "tokens", "perplexity", "recovered", "gap closed", "layer error"]
    table = [head + [f"recall {d}" for d in distances]]
    order = [TEACHER, BASELINE, SWAP, *_stages(record)]
    for name in (name for name in order if name in record.figures):
        found, trained = record.figures[name], name not in (TEACHER, BASELINE)
        gap = closed(record, found) if trained and name != SWAP else None
        error = sum(found.transfer.values()) / max(len(found.transfer), 1)
        table.append(
            [
                label(name),
                readable.count(found.tokens) if trained else DASH,
                f"{found.perplexity:#.4g}",
                DASH if name == TEACHER else f"{recovered(record, found):.1%}",
                _percent(gap),
                f"{error:.3f}" if found.transfer else DASH,
                *(
                    DASH if share is None else f"{share:.0%}"
                    for share in map(found.recall.get, distances)
                ),
            ]
        )
    return table


def table(record: Record) -> Table:
    """The same for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    head, *lines = rows(record)
    for at, name in enumerate(head):
        folded = name.replace(" ", "\n")
        shown.add_column(folded, justify="right" if at else "left", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    return shown


def write(record: Record) -> pathlib.Path:
    """Write report.html and its pictures, of whatever has been measured so far; the page's path."""
    drawn = pictures.draw(record.folder, *_lines(record)) if SWAP in record.figures else []
    sections = [
        page.tiles_grid(_tiles(record)),
        page.charts_grid([page.picture(p.name, p.alt, p.size, p.size[0] > 8) for p in drawn]),
        page.section("Figures", _html(rows(record))),
        page.section("What changed", page.facts_list(_facts(record))),
        f'<footer>All figures are from <a href="{FILE}">{FILE}</a>; the curves of each stage '
        "are in stages/.</footer>",
    ]
    path, title = record.folder / "report.html", pathlib.Path(record.request.teacher).name
    put(path, page.document(f"Linearization by {record.request.method}", title, sections))
    return path


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{share:.0%}"


def _stages(record: Record) -> list[str]:
    return [name for name in record.figures if name not in NAMES]


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    figures, known = record.figures, record.estimate
    last = figures[(_stages(record) or [SWAP])[-1]] if SWAP in figures else None
    if last is None or known is None:
        return [("Recovered", DASH, "nothing measured yet")]
    untrained = figures.get(BASELINE)
    beside = (
        f"{recovered(record, untrained):.1%} by an untrained window and sinks" if untrained else ""
    )
    gap = closed(record, last)
    return [
        ("Recovered of the teacher's perplexity", f"{recovered(record, last):.1%}", beside),
        ("Perplexity", f"{last.perplexity:#.4g}", f"teacher {figures[TEACHER].perplexity:#.4g}"),
        ("Gap closed", _percent(gap), "of the nats the swap cost"),
        ("Tokens", readable.count(last.tokens), "trained on"),
        (
            "State",
            readable.size(known.state_bytes),
            f"a KV cache of {known.break_even:,} tokens is larger",
        ),
    ]


def _lines(record: Record) -> tuple[list[Line], dict[str, float], list[Line], list[Line]]:
    """What `pictures.draw` shows."""
    figures, stages = record.figures, _stages(record)
    levels = {NAMES[TEACHER]: 1.0}
    if BASELINE in figures:
        levels[NAMES[BASELINE]] = recovered(record, figures[BASELINE])
    student = (stages or [SWAP])[-1]
    errors = [Line(label(n), *_pairs(figures[n].transfer)) for n in (SWAP, *stages)]
    asked = [(NAMES[TEACHER], TEACHER), (NAMES[BASELINE], BASELINE), ("student", student)]
    recall = [Line(name, *_pairs(figures[n].recall)) for name, n in asked if n in figures]
    whole = len(recall) == len(asked) and all(line.xs for line in recall)
    return curves(record), levels, errors, recall if whole else []


def curves(record: Record) -> list[Line]:
    """What each stage recovered on its way, from its own evaluations where those read rows as long
    as ours."""
    found, before = [], SWAP
    for name, stage in zip(_stages(record), record.request.runs.values(), strict=False):
        start = record.figures[before]
        points = [(start.tokens, recovered(record, start))]
        for row in _evaluations(record.folder / "stages" / name):
            share = math.exp(record.figures[TEACHER].loss - row["held_out_loss"])
            points.append((start.tokens + row["step"] * stage.batch * stage.length, share))
        last = record.figures[name]
        points = [p for p in points if p[0] < last.tokens]
        points.append((last.tokens, recovered(record, last)))
        xs, ys = zip(*points, strict=True)
        found.append(Line(label(name), xs, ys))
        before = name
    return found


def _evaluations(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    held = metrics.read(path) if path.exists() else []
    return [row for row in held if row.get("held_out_loss") is not None]


def _pairs(found: Mapping[int, float | None]) -> tuple[list[int], list[float]]:
    return list(found), [math.nan if value is None else value for value in found.values()]


def _html(table: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        first, *rest = cells
        numbers = "".join(f'<{tag} class="n">{text(cell)}</{tag}>' for cell in rest)
        return f"<tr><{tag}>{text(first)}</{tag}>{numbers}</tr>"

    body = "\n".join(line(cells, "td") for cells in table[1:])
    return (
        '<div class="card scroll"><table>\n'
        f"<thead>{line(table[0], 'th')}</thead>\n<tbody>{body}</tbody>\n</table></div>"
    )


def _facts(record: Record) -> dict[str, Any]:
    r, found = record.request, record.estimate
    facts: dict[str, Any] = {
        "Teacher": r.teacher,
        "Method": f"{r.method}: {METHODS[r.method].source}",
        "Mixer": " ".join([r.mixer, *r.fields]),
        "Held out": f"{', '.join(source.name for source in r.held_out)}",
    }
    if found is not None:
        kept = set(range(found.layers)) - set(found.replaced)
        facts |= {
            "Layers changed": readable.spans(found.replaced),
            **({"Layers that stay": readable.spans(kept)} if kept else {}),
            "Parameters of the teacher": found.parameters,
            "Parameters added": found.added,
        }
        for name, trained in zip(r.runs, found.trained, strict=True):
            facts[f"Trained in {label(name)}"] = trained
    return facts
