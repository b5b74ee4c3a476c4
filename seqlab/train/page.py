"""The HTML of a run report: everything foreign in it is escaped, nothing is fetched."""

import html
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from seqlab.train import readable
from seqlab.train.charts import CHARTS, DPI

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1c2430;
  --muted: #667085; --line: #e4e7ec; --accent: #2f6fde; --good: #18794e; --code: #f8f9fb; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1319; --card: #171c24; --ink: #e6eaf1;
  --muted: #939dae; --line: #2a323e; --accent: #6ea3ff; --good: #5bcf9a; --code: #11161d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 17px; }
.kicker { margin: 0 0 4px; color: var(--muted); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px;
  margin: 24px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile.main { grid-column: span 2; }
.tile span { display: block; color: var(--muted); font-size: 13px; }
.tile b { display: block; font-size: 26px; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; white-space: nowrap; }
.tile.main b { color: var(--accent); }
.tile .good { color: var(--good); }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.charts .card { padding: 10px 12px 6px; }
.charts .wide { grid-column: 1 / -1; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 16px; text-align: left; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-weight: 500; font-size: 13px; }
.n { text-align: right; white-space: nowrap; }
tfoot td { font-weight: 650; }
figure { margin: 0 0 12px; }
figcaption { padding: 9px 16px; color: var(--muted); font-size: 13px;
  border-bottom: 1px solid var(--line); }
pre { margin: 0; padding: 14px 16px; font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo,
  Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre mark { background: none; color: var(--accent); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 0;
  padding: 14px 16px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
details summary { cursor: pointer; padding: 11px 16px; font-weight: 500; }
details pre { border-top: 1px solid var(--line); background: var(--code);
  border-radius: 0 0 10px 10px; }
footer { margin-top: 32px; color: var(--muted); font-size: 13px; }
a { color: var(--accent); }
@media (max-width: 760px) { .charts { grid-template-columns: 1fr; }
  .tile.main { grid-column: 1 / -1; } main { padding: 24px 14px; } }
"""


def page(
    title: str,
    tiles: Sequence[tuple[str, str, str]],
    model_table: Sequence[Mapping],
    samples: Sequence[str | Mapping],
    facts: Mapping[str, Any],
    config: Any,
) -> str:
    """The whole document. A tile is (label, figure, remark); the first is the headline."""
    sections = [
        tiles_grid(tiles),
        _charts(),
        section("Model", _model(model_table)) if model_table else "",
        section("Samples", "".join(map(_sample, samples))) if samples else "",
        section("Run", facts_list(facts)) if facts else "",
        section("Config", _config(config)) if config is not None else "",
        '<footer>All figures are from <a href="metrics.jsonl">metrics.jsonl</a>.</footer>',
    ]
    return document("Training run", title, sections)


def document(kicker: str, title: str, sections: Sequence[str]) -> str:
    """A page in this style: a small line, the title below it, then sections of HTML."""
    head = f'<p class="kicker">{text(kicker)}</p>\n<h1>{text(title)}</h1>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, [head, *sections]))
        + "\n</main>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Any text as HTML, with characters that would not be seen, or would reorder it, spelled out.

    Control and formatting characters and lone surrogates become escapes such as \\x1b, \\u202e.
    Newlines and tabs stay.
    """
    return html.escape("".join(map(_visible, str(value))))


def _visible(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"):
        return char
    return char.encode("unicode_escape").decode()


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def tiles_grid(tiles: Sequence[tuple[str, str, str]]) -> str:
    cards = []
    for index, (label, figure, remark) in enumerate(tiles):
        kind = "card tile main" if index == 0 else "card tile"
        shade = ' class="good"' if "below" in remark else ""
        note = f"<span{shade}>{text(remark)}</span>" if remark else ""
        cards.append(
            f'<div class="{kind}"><span>{text(label)}</span><b>{text(figure)}</b>{note}</div>'
        )
    return '<div class="tiles">\n' + "\n".join(cards) + "\n</div>"


def _charts() -> str:
    return charts_grid(
        [picture(c.name, f"{c.title} by training step", c.size, c.wide) for c in CHARTS]
    )


def charts_grid(pictures: Sequence[str]) -> str:
    return '<div class="charts">\n' + "\n".join(pictures) + "\n</div>"


def picture(name: str, alt: str, size: tuple[float, float], wide: bool = True) -> str:
    """NAME.png, or where the reader likes it dark NAME.dark.png; `size` in inches."""
    width, height = (round(side * DPI) for side in size)
    return (
        f'<picture class="card{" wide" if wide else ""}">'
        f'<source media="(prefers-color-scheme: dark)" srcset="{name}.dark.png">'
        f'<img src="{name}.png" alt="{text(alt)}" width="{width}" height="{height}"></picture>'
    )


def _model(table: Sequence[Mapping]) -> str:
    rows = [
        f"<tr><td>{text(row['block'])}</td><td>{text(row['mixer'])}</td>"
        f'<td class="n">{row["parameters"]:,}</td>'
        f'<td class="n">{_state(row["state_bytes"])}</td></tr>'
        for row in table
    ]
    parameters = sum(row["parameters"] for row in table)
    state = sum(row["state_bytes"] or 0 for row in table)
    return (
        '<div class="card scroll"><table>\n<thead><tr><th>Block</th><th>Mixer</th>'
        '<th class="n">Parameters</th><th class="n">State per sequence</th></tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody>\n<tfoot><tr><td>Total</td><td></td>"
        f'<td class="n">{parameters:,}</td><td class="n">{_state(state)}</td></tr></tfoot>\n'
        "</table></div>"
    )


def _state(amount: int | None) -> str:
    return readable.size(amount) if amount else "–"


def _sample(sample: str | Mapping) -> str:
    if isinstance(sample, str):
        sample = {"text": sample}
    note = f"<figcaption>{text(sample['note'])}</figcaption>" if sample.get("note") else ""
    prompt = f"<mark>{text(sample['prompt'])}</mark>" if sample.get("prompt") else ""
    return f'<figure class="card">{note}<pre>{prompt}{text(sample["text"])}</pre></figure>'


def facts_list(facts: Mapping[str, Any]) -> str:
    items = (f"<dt>{text(name)}</dt><dd>{_fact(value)}</dd>" for name, value in facts.items())
    return f'<dl class="card">{"".join(items)}</dl>'


def _fact(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else f"{value:.4g}" if isinstance(value, float) else text(value)


def _config(config: Any) -> str:
    shown = text(json.dumps(config, indent=2, ensure_ascii=False))
    return f'<details class="card"><summary>config.json</summary><pre>{shown}</pre></details>'
