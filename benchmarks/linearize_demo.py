"""Every way to linearize, on one small teacher: what is left of its text and of its recall.

    python -m benchmarks.linearize_demo            # 25 minutes on two idle cores
    python -m benchmarks.linearize_demo --go-on    # keep what an interrupted run has finished
    python -m benchmarks.linearize_demo --draw     # the pictures alone, from results/linearize.json
    python -m benchmarks.linearize_demo --long     # the methods that much is asked of, for longer

The teacher is a transformer over bytes, behind one short convolution: with it, copying is found
out sooner. It learns that from short pieces of text said over and over, then from lines of a table
with little between them, then far from one another; then it reads the standard library's sources,
and in a tenth of its rows such lines. It is trained once and stays in runs/linearize_demo/teacher;
students are made anew. A demo, not a test: what its claims come to is printed, and it exits with 0.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from flax import nnx

import benchmarks.record as record
from benchmarks import linearize_pictures as pictures
from benchmarks.linearize import milliseconds, with_room
from seqlab import heap
from seqlab.layers import ffn
from seqlab.layers.mixers import attention, gated_conv
from seqlab.linearize import recall, stage
from seqlab.linearize.measure import Judge
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recipes import METHODS, Stage
from seqlab.linearize.swap import swap
from seqlab.models import lm
from seqlab.models.parameters import parameters
from seqlab.models.summary import state_bytes
from seqlab.models.tokenizer import ByteTokenizer
from seqlab.parallel.mesh import use_mesh
from seqlab.train.config import Checkpoint, Config, Optimizer
from seqlab.train.data import Data
from seqlab.train.held_out import held_out_batches, held_out_text
from seqlab.train.loop import train
from seqlab.train.sources import Jsonl, Text

OUT = pathlib.Path("runs/linearize_demo")
DOCS = pathlib.Path(__file__).parent.parent / "docs"
#: By name the method and the layers that keep their softmax: in liger_h, a hybrid of Liger's, the
#: first one of attention, which here is the one that looks values up.
STUDENTS = {
    "swa": ("swa", ()),
    "swa_sink": ("swa_sink", ()),
    "liger": ("liger", ()),
    "liger_h": ("liger", (1,)),
    "lolcats": ("lolcats", ()),
    "lizard_rope": ("lizard_rope", ()),
    "lizard": ("lizard", ()),
    "hedgehog": ("hedgehog", ()),
}
WINDOW, SINKS, LENGTH = 64, 4, 1024  # tokens
HELD_OUT_ROWS = 16
CONTEXTS = 1024, 8192  # tokens read before decoding is timed
RECOVERED = dict.fromkeys(("liger", "lolcats", "lizard_rope"), 0.95)  # at least
KNOWN = 0.5  # of the teacher's recall, below which a student's says nothing
ABOVE = 0.25  # by which some recall beyond the window is above the untrained window's
MINUTES = 15
TOKENS, MORE = 400_000, 1_000_000  # a stage

#: What the papers give for billions of parameters and 20M tokens, made fit for a thousandth: many
#: steps of few tokens each.
FEWER = {"length": LENGTH, "batch": 1, "warmup": 0.05, "schedule": "cosine"}
RATES = {"layer": 2e-2, "ce": 4e-3}

STDLIB: dict[str, Any] = {"files": ("python:stdlib",), "held_out": 0.03}
BYTES = ByteTokenizer()

MODEL = lm.Config(
    vocab=BYTES.vocab,
    d_model=128,
    before=(gated_conv.Config(conv_width=8),),
    pattern=(attention.Config(heads=4, kv_heads=2, max_length=LENGTH),),
    repeats=4,
    ffn=ffn.Config(ratio=8 / 3),
    unroll=4,
)


def main(options: list[str]) -> int:
    if "--draw" in options:
        told = json.loads((record.RESULTS / "linearize.json").read_text())
        pictures.draw(DOCS, told["rows"])
        return 0
    heap.keep()
    long = "--long" in options
    students = OUT / ("long" if long else "students")
    if "--go-on" not in options:
        shutil.rmtree(students, ignore_errors=True)
    minutes = lambda: time.process_time() / 60 / (os.cpu_count() or 1)
    say = lambda name: print(f"{name} is done after {minutes():.1f} busy minutes", flush=True)
    teacher, data = taught()
    say("The teacher")
    with use_mesh() as mesh:
        filler = BYTES.encode(held_out_text(data).decode())
        ask = lambda model: recall.recall(model, BYTES, filler, count=32, say=lambda text: None)
        judge = Judge(held_out_batches(data, BYTES), mesh, ask)
        rows = [of_teacher(teacher, judge)]
        for name in RECOVERED if long else STUDENTS:
            rows.append(of_student(name, teacher, data, judge, MORE if long else TOKENS, students))
            rows[-1]["recovered"] = rows[0]["perplexity"] / rows[-1]["perplexity"]
            say(f"{name}, {summary(rows[-1])},")
    if long:
        record.record("linearize_long", rows, recovered(rows))
        return 0
    for folder in (OUT, DOCS):
        pictures.draw(folder, rows)
    record.record("linearize", rows, [*recovered(rows), *recalled(rows), within(minutes())])
    return 0


def taught() -> tuple[lm.LM, Data]:
    """The teacher, and what it learnt last: what is there of it already is kept."""
    folder, betas = OUT / "teacher", (0.9, 0.98)
    copying = mixture("copying", 128, 0.75, documents=8000, gap=None)
    lines = mixture("lines", 128, 0.8, documents=8000, gap=4)
    far = mixture("far", LENGTH, 0.8, documents=1000, gap=20, far=True)
    text = mixture("text", LENGTH, 0.1, documents=1000, gap=40, far=True)
    constant = Optimizer(lr=5e-3, betas=betas, warmup=30, schedule="constant")
    train(lesson(copying, 300, constant), folder / "copying")
    lower = dataclasses.replace(constant, lr=3e-3, warmup=10)
    train(lesson(lines, 250, lower, start=str(folder / "copying")), folder / "lines")
    train(lesson(far, 80, lower, start=str(folder / "lines")), folder / "far")
    cosine = Optimizer(lr=3e-3, betas=betas, warmup=30)
    last = lesson(text, 240, cosine, start=str(folder / "far"))
    return train(last, folder / "text").model, text


def lesson(data: Data, steps: int, optimizer: Optimizer, **fields: Any) -> Config:
    every = {"evaluate_every": 0, "checkpoint": Checkpoint(every=50)}
    return Config(MODEL, data, steps, optimizer, **every, **fields)


def mixture(name: str, length: int, share: float, **asked: Any) -> Data:
    """The library's sources, and `share` of the rows documents of recall lines, a row long."""
    file, text = (
        OUT / f"{name}.jsonl",
        Text(**STDLIB, part="train", weight=1 - share, name="stdlib"),
    )
    recall.write(file, text, length=length - 2, **asked)
    return Data(
        train=(text, Jsonl((str(file),), weight=share, name="recall")),
        held_out=(Text(**STDLIB, part="held_out", name="stdlib"),),
        length=length,
        batch=4 * LENGTH // length,
        held_out_rows=HELD_OUT_ROWS * LENGTH // length,
    )


def of_teacher(teacher: lm.LM, judge: Judge) -> dict[str, Any]:
    figures = judge.teacher(teacher)
    row = dict.fromkeys(("new", "trained", "tokens"), 0)
    row |= dict.fromkeys(("at the swap", "after stage 1", "after stage 2"))
    return measured("teacher", row, figures, teacher, decoding(teacher)) | {"recovered": 1.0}


def decoding(model: lm.LM) -> list[float]:
    """Milliseconds a token behind so many; a layer that keeps its softmax gets room for them."""
    room = lambda n: model if model.max_length is None else with_room(model, n + LENGTH)
    return [milliseconds({"": room(n)}, n)[""] for n in CONTEXTS]


def of_student(name: str, teacher: lm.LM, data: Data, judge: Judge, tokens: int, runs) -> dict:
    """One method: its swap, its stages, and what was measured before and after each."""
    method, keep = STUDENTS[name]
    stages = [shortened(one, tokens) for one in METHODS[method].stages]
    window = {} if method == "hedgehog" else {"window": WINDOW - SINKS * (method == "swa_sink")}
    target = lambda mixer: PRESETS[METHODS[method].target](mixer, **window)
    pair = swap(teacher, target, keep=keep, rngs=nnx.Rngs(0))
    found, trained, tokens = [judge.student(pair)], 0, 0
    for number, one in enumerate(stages, 1):
        adapted = stage.adapted(pair.student, one)
        names = stage.trained(pair, adapted, one)
        trained += sum(parameters(adapted)[n].size for n in names)
        folder = runs / name / f"{number}-{one.loss}"
        pair = stage.run(pair, one, data, folder, evaluate_every=one.steps // 4)
        tokens += one.tokens
        found.append(judge.student(pair, tokens))
    after = [figures.perplexity for figures in found] + [None] * (3 - len(found))
    row = {
        "new": sum(parameters(pair.student)[n].size for n in pair.extra),
        "trained": trained,
        "tokens": tokens,
        **dict(zip(("at the swap", "after stage 1", "after stage 2"), after, strict=True)),
    }
    return measured(name, row, found[-1], pair.student, decoding(pair.student))


def shortened(one: Stage, tokens: int) -> Stage:
    return dataclasses.replace(one, **FEWER, tokens=tokens, lr=RATES[one.loss])


def measured(name: str, row: dict, figures, model: lm.LM, times: list[float]) -> dict[str, Any]:
    return {
        "method": name,
        **row,
        "perplexity": figures.perplexity,
        "recovered": None,
        **{f"recall {distance}": share for distance, share in figures.recall.items()},
        "state bytes": state_bytes(model),
        **{f"ms at {n}": ms for n, ms in zip(CONTEXTS, times, strict=True)},
    }


def summary(row: dict[str, Any]) -> str:
    recalled = (f"{row[f'recall {n}']:.0%} over {n}" for n in recall.DISTANCES)
    share = f"{row['recovered']:.1%} of the teacher's perplexity"
    return f"perplexity {row['perplexity']:.3f}, {share}, recall {', '.join(recalled)}"


def recovered(rows: list[dict]) -> list[record.Claim]:
    shares = {row["method"]: row["recovered"] for row in rows}
    says = "{} recovers at least {:.0%}"
    return [
        record.Claim(says.format(name, least), f"{shares[name]:.1%}", shares[name] >= least)
        for name, least in RECOVERED.items()
    ]


def recalled(rows: list[dict]) -> list[record.Claim]:
    by_name = {row["method"]: row for row in rows}
    made = []
    for distance in recall.DISTANCES[1:]:
        if by_name["teacher"][f"recall {distance}"] < KNOWN:
            continue
        of = lambda name, distance=distance: by_name[name][f"recall {distance}"]
        best, alone = max(STUDENTS, key=of), of("swa_sink")
        says = f"recall over {distance}: {best} well above the untrained window and sinks"
        figures = f"{of(best):.0%} and {alone:.0%}"
        made.append(record.Claim(says, figures, of(best) >= alone + ABOVE))
    return made


def within(minutes: float) -> record.Claim:
    """Of what the cores did for it: it does not depend on what else they had to do."""
    return record.Claim(
        f"within {MINUTES} minutes of all cores", f"{minutes:.1f}", minutes <= MINUTES
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
