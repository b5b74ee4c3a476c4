"""The tables of performance.md, from what benchmarks left in benchmarks/results.

    python -m docs.performance

writes them anew between their markers; it measures nothing. A test compares the two.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks import aims
from docs.status import replaced
from seqlab.bench.record import LEFT_OUT, RESULTS, shown
from seqlab.bench.timing import SPREAD
from seqlab.train import readable

PAGE = pathlib.Path(__file__).parent / "performance.md"
ROOT = PAGE.parent.parent
DEVICES = ("CPU", "GPU", "TPU")
PACKAGES = ("python", "jax", "torch", "transformers")  # whose versions are shown

#: Races with other packages: the file, its command, and the device that they are run on.
RACES = {
    "training": ("python -m benchmarks.training", "CPU"),
    "mixers_raced": ("python -m benchmarks.mixers", "CPU"),
    "inference": ("python -m benchmarks.inference", "CPU"),
    "gpu_peers": ("python -m benchmarks.gpu_peers", "GPU"),
}
MIXERS = "--mixers 'gla,mamba2,gated_delta_net,mlstm'"


class Question(NamedTuple):
    """A command of `seqlab bench`, what it answers, and the figures to show of a row."""

    name: str
    command: str
    title: str
    named: tuple[str, ...]
    figures: tuple[str, ...]


QUESTIONS = (
    Question(
        "kernels",
        "seqlab bench kernels all",
        "Kernels: every form against XLA's, and against a copy and a product of matrices",
        ("kernel", "size", "form", "pass"),
        ("ms", "against xla", "of the copy", "of the product"),
    ),
    Question(
        "train",
        f"seqlab bench train {MIXERS}",
        "Training: a step, against softmax attention in a model of equal size",
        ("model", "size"),
        ("tokens/s", "against softmax", "of the product"),
    ),
    Question(
        "prefill",
        f"seqlab bench prefill {MIXERS}",
        "Reading a prompt",
        ("model", "batch", "context"),
        ("tokens/s", "against softmax"),
    ),
    Question(
        "decode",
        f"seqlab bench decode {MIXERS}",
        "Decoding: a step, against softmax attention and against reading weights and states once",
        ("model", "batch", "context", "state bytes"),
        ("us a step", "against softmax", "times the least"),
    ),
)


def tables(results: pathlib.Path) -> str:
    """All of them, in Markdown."""
    parts = [_races(results), *(_answers(results, question) for question in QUESTIONS)]
    return "\n".join(parts)


def renewed(page: str) -> str:
    return replaced(page, tables(ROOT / RESULTS), "results", by="-m docs.performance")


def _races(results: pathlib.Path) -> str:
    head = ["what", "peer", "pass", "tokens a row", "ratio", "of CPU seconds", "aim", "holds"]
    lines, notes, verdicts = [], [], []
    for name, (command, device) in RACES.items():
        told = _read(results / f"{name}.json")
        if told is None:
            lines.append([device, "not measured", "", "", "", "", "", f"`{command}`"])
            continue
        notes.append(_source(told, command))
        lines += [_race(row) for row in told["rows"]]
        verdicts += [aims.holds(row) for row in told["rows"]]
    text = f"{sum(verdicts)} of {len(verdicts)} hold; those that do not are marked.\n\n"
    return _headed("Against other packages", text + _table(head, lines), notes)


def _race(row: dict) -> list[str]:
    return [
        row.get("model") or row["what"],
        row.get("peer", "transformers"),
        row.get("pass", aims.TRAINING),
        shown(row.get("tokens a row")),
        _ratio(row, "ratio"),
        _ratio(row, "ratio of CPU seconds"),
        f"{aims.aim(row):g}",
        "yes" if aims.holds(row) else "**no**",
    ]


def _answers(results: pathlib.Path, question: Question) -> str:
    """A table for each file that answers the question; a line for devices that have none."""
    found = sorted(results.glob(f"{question.name}_*.json"))
    told = [(path, content) for path in found if "command" in (content := _read(path) or {})]
    there = {_device(content) for _, content in told}
    absent = [[d, "not measured", f"`{question.command}`"] for d in DEVICES if d not in there]
    text = _table(["device", "", "command"], absent) if absent else ""
    notes = []
    for _, content in told:
        text += "\n" * bool(text) + _rows(question, content)
        notes.append(_source(content, content["command"]))
    return _headed(question.title, text, notes)


def _rows(question: Question, content: dict) -> str:
    lines = []
    for row in content["rows"]:
        named = [
            readable.size(row[name]) if name == "state bytes" and name in row else shown(row[name])
            for name in question.named
            if name in row or LEFT_OUT not in row
        ]
        figures = [_ratio(row, name) for name in question.figures]
        if LEFT_OUT in row:
            named += [""] * (len(question.named) - len(named))
            figures = [f"left out: {row[LEFT_OUT]}", *[""] * (len(figures) - 1)]
        lines.append([*named, *figures])
    return _table([*question.named, *question.figures], lines)


def _source(told: dict, command: str) -> str:
    """The machine and the versions behind a table, and the load of other work."""
    m = told["machine"]
    versions = [f"{name} {m[name]}" for name in PACKAGES if name in m]
    parts = [f"`{told.get('command', command)}`", m.get("date", "no date kept"), m["device"]]
    cores = f"{m['cpus']} cores of {m['processor']}" if "cpus" in m else ""
    load = f"load of the machine before it {m['load']}" if "load" in m else ""
    return ", ".join(filter(None, [*parts, cores, *versions, load]))


def _device(told: dict) -> str:
    kind = told["machine"]["device"].lower()
    return "CPU" if "cpu" in kind else "TPU" if "tpu" in kind else "GPU"


def _ratio(row: dict, name: str) -> str:
    """A median with its quartiles."""
    if row.get(name) is None:
        return ""
    if name + SPREAD not in row:
        return f"{row[name]:.2f}"
    low, high = row[name + SPREAD]
    digits = 2 if row[name] < 100 else 0
    return f"{row[name]:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def _headed(title: str, text: str, notes: Iterable[str]) -> str:
    return f"## {title}\n\n{text}" + "".join(f"\n- {note}" for note in notes) + "\n" * bool(notes)


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in rows)


def _read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text("utf-8")), "utf-8")
