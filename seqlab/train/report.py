"""report.html: a training run on one page that opens offline, with its curves as PNGs beside it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqlab.train import charts, metrics, readable
from seqlab.train.folder import put
from seqlab.train.page import page

LAST = 50  # training steps whose mean stands for the end, where nothing was held out


def write_report(
    run_folder: str | os.PathLike,
    *,
    title: str,
    model_table: Sequence[Mapping] = (),
    facts: Mapping[str, Any] | None = None,
    samples: Sequence[str | Mapping] = (),
    baselines: Mapping[str, float] | None = None,
) -> Path:
    """Write report.html and its PNGs from the metrics.jsonl and config.json of a run; its path.

    model_table: rows of `block`, `mixer` (text), `parameters` (all repeats together) and
        `state_bytes` (per sequence; None or 0 if the block has no state).
    facts: what else is worth knowing, by name: text or numbers.
    samples: texts, or mappings of `text` and optionally `prompt` (shown before it) and `note`.
    baselines: bits per byte on the same held-out data by name; the first is the one to beat.

    Works while the run goes on and with any number of rows, none included.
    """
    folder = Path(run_folder)
    path, log = folder / "report.html", folder / "metrics.jsonl"
    rows = metrics.read(log) if log.exists() else []
    baselines = dict(baselines or {})
    charts.draw(rows, folder, baselines)
    tiles = headline(rows, sum(row["parameters"] for row in model_table), baselines)
    config = folder / "config.json"
    fields = json.loads(config.read_text("utf-8")) if config.exists() else None
    text = page(title, tiles, model_table, samples, _run_facts(rows) | dict(facts or {}), fields)
    put(path, text)
    return path


def headline(
    rows: Sequence[Mapping], parameters: int, baselines: Mapping[str, float]
) -> list[tuple[str, str, str]]:
    """The tiles of the page: (label, figure, remark)."""
    tokens, seconds = _last(rows, "tokens"), wall_time(rows)
    speeds = charts.curve(rows, "tokens_per_second").finite.values
    return [
        _result(rows, baselines),
        ("Parameters", readable.count(parameters) if parameters else "–", ""),
        ("Tokens seen", "–" if tokens is None else readable.count(tokens), ""),
        ("Wall time", readable.duration(seconds) if seconds else "–", ""),
        (
            ("Tokens per second", readable.count(np.median(speeds)), "median")
            if len(speeds)
            else ("Tokens per second", "–", "")
        ),
    ]


def wall_time(rows: Sequence[Mapping]) -> float:
    """Seconds of training; the clock of a row starts anew whenever the run is resumed."""
    seconds = charts.curve(rows, "seconds").finite.values
    if not len(seconds):
        return 0.0
    ends = np.append(seconds[:-1][np.diff(seconds) < 0], seconds[-1])
    return float(ends.sum())


def _result(rows: Sequence[Mapping], baselines: Mapping[str, float]) -> tuple[str, str, str]:
    held_out = charts.curve(rows, "held_out_bits_per_byte").finite.values
    if len(held_out):
        label, value = "Held-out bits per byte", float(held_out[-1])
    else:
        train = charts.curve(rows, "bits_per_byte").finite.values[-LAST:]
        if not len(train):
            return ("Held-out bits per byte", "–", "no evaluation yet")
        return ("Training bits per byte", f"{train.mean():.3f}", "nothing held out yet")
    if not baselines:
        return (label, f"{value:.3f}", "")
    name, bar = next(iter(baselines.items()))
    side = "below" if value < bar else "above"
    return (label, f"{value:.3f}", f"{abs(value / bar - 1):.1%} {side} {name} ({bar:.3f})")


def _run_facts(rows: Sequence[Mapping]) -> dict[str, Any]:
    """What the rows themselves tell."""
    facts: dict[str, Any] = {}
    if (steps := _last(rows, "step")) is not None:
        facts["Steps"] = steps
    waits = charts.curve(rows, "data_wait").finite.values
    if len(waits):
        facts["Waiting for data"] = f"{waits.mean():.1%} of the time"
    losses = charts.curve(rows, "loss")
    if lost := len(losses.values) - len(losses.finite.values):
        facts["Steps without a finite loss"] = lost
    return facts


def _last(rows: Sequence[Mapping], key: str) -> Any:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)
