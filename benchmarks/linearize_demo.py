"""Every way to linearize, on one small teacher: what is left of its text and of its recall.

    python -m benchmarks.linearize_demo            # a quarter of an hour on two cores
    python -m benchmarks.linearize_demo --go-on    # keep what an interrupted run has finished
    python -m benchmarks.linearize_demo --draw     # the pictures alone, from results/linearize.json

The teacher is a transformer over bytes. It learns to copy from short tables said over and over, to
a quarter among the standard library's sources; then those sources in long rows, a tenth of which
hold lines of a table between stretches of text. It is trained once and stays in
runs/linearize_demo/teacher; students are made anew.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
from flax import nnx

import benchmarks.record as record
from benchmarks import linearize_pictures as pictures
from benchmarks.linearize import milliseconds
from seqlab import heap
from seqlab.layers import ffn
from seqlab.layers.mixers import attention
from seqlab.linearize import recall, stage
from seqlab.linearize.measure import Judge
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recipes import METHODS, Stage
from seqlab.linearize.record import Figures
from seqlab.linearize.swap import Pair, swap
from seqlab.models import lm
from seqlab.models.tokenizer import ByteTokenizer
from seqlab.parallel.mesh import use_mesh
from seqlab.train import metrics
from seqlab.train.config import Checkpoint, Config, Optimizer
from seqlab.train.data import Data
from seqlab.train.held_out import held_out_batches, held_out_text
from seqlab.train.loop import train
from seqlab.train.sources import Jsonl, Text

OUT = pathlib.Path("runs/linearize_demo")
DOCS = pathlib.Path(__file__).parent.parent / "docs"
ASKED = "swa", "swa_sink", "liger", "lolcats", "lizard", "lizard_rope", "hedgehog"
WINDOW, SINKS, LENGTH = 64, 4, 1024  # tokens
CONTEXTS = 1024, 8192  # tokens read before decoding is timed
RECOVERED = {"liger": 0.95, "lolcats": 0.95, "lizard_rope": 0.95}  # at least
MINUTES = 15

#: What the papers give for billions of parameters and 20M tokens, made fit for a thousandth.
FEWER = {"tokens": 262_144, "length": LENGTH, "batch": 4, "warmup": 0.1, "schedule": "cosine"}
RATES = {"layer": 1e-2, "ce": 2e-3}

STDLIB: dict[str, Any] = {"files": ("python:stdlib",), "held_out": 0.03}
TRAIN, HELD_OUT = (Text(**STDLIB, part=part, name="stdlib") for part in ("train", "held_out"))

MODEL = lm.Config(
    vocab=257,
    d_model=128,
    pattern=(attention.Config(heads=4, kv_heads=2, max_length=LENGTH),),
    repeats=4,
    ffn=ffn.Config(ratio=8 / 3),
    unroll=4,
)


def main(options: list[str]) -> int:
    if "--draw" in options:
        pictures.draw(DOCS, json.loads((record.RESULTS / "linearize.json").read_text())["rows"])
        return 0
    heap.keep()
    began = time.monotonic()
    if "--go-on" not in options:
        shutil.rmtree(OUT / "students", ignore_errors=True)
    teacher, data = taught(), mixture("text", LENGTH, SHARE, gap=200)
    with use_mesh() as mesh:
        judge = Judge(held_out_batches(data, BYTES), mesh, asked(data))
        rows = [row("teacher", teacher, [judge.teacher(teacher)])]
        for name in ASKED:
            rows.append(linearized(name, teacher, data, judge, rows[0]))
            print(f"{name} is done after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    for folder in (OUT, DOCS):
        pictures.draw(folder, rows)
    minutes = (time.monotonic() - began) / 60
    return record.record("linearize", rows, claims(rows, minutes))


def taught() -> lm.LM:
    """The teacher: copying first, on short rows, then the text; what is there already is kept."""
    copying = mixture("copying", 128, 0.75, gap=0)
    folder = OUT / "teacher"
    train(lesson(copying, 150, Optimizer(lr=5e-3, schedule="constant")), folder / "copying")
    text = mixture("text", LENGTH, SHARE, gap=200)
    then = lesson(text, 400, Optimizer(lr=4e-3), start=str(folder / "copying"))
    return train(then, folder / "text").model


def lesson(data: Data, steps: int, optimizer: Optimizer, **fields: Any) -> Config:
    return Config(MODEL, data, steps, optimizer, checkpoint=Checkpoint(every=50), **fields)


def mixture(name: str, length: int, share: float, *, gap: int) -> Data:
    """The library's sources, and `share` of the rows documents of recall lines as long as a row."""
    file = OUT / f"{name}.jsonl"
    recall.write(file, TRAIN, documents=4 * 2**20 // length, length=length - 2, gap=gap)
    lines = Jsonl((str(file),), name="recall", weight=share)
    return Data(
        train=(dataclasses.replace(TRAIN, weight=1 - share), lines),
        held_out=(HELD_OUT,),
        length=length,
        batch=4 * LENGTH // length,
        held_out_rows=ROWS * LENGTH // length,
    )


def linearized(name: str, teacher: lm.LM, data: Data, judge: Judge, best: dict) -> dict:
    """The row of one method: swap, its stages, and what was measured before and after each."""
    target = lambda mixer: PRESETS[METHODS[name].target](mixer, **WINDOWS.get(name, {}))
    pair = swap(teacher, target, rngs=nnx.Rngs(0))
    figures, trained = [judge.student(pair)], 0
    for number, one in enumerate(map(shortened, METHODS[name].stages), 1):
        folder = OUT / "students" / name / f"{number}-{one.loss}"
        adapted = stage.adapted(pair.student, one)
        trained += sum(parameters(adapted)[n].size for n in stage.trained(pair, adapted, one))
        every = {"evaluate_every": one.steps // 8, "checkpoint": Checkpoint(every=one.steps)}
        pair = stage.run(pair, one, data, folder, **every)
        tokens = figures[-1].tokens + one.tokens
        figures.append(judge.student(pair, tokens))
    return row(name, pair.student, figures, pair, trained, best)


def shortened(one: Stage) -> Stage:
    return dataclasses.replace(one, **FEWER, lr=RATES[one.loss])


def row(
    name: str, model: lm.LM, figures: list[Figures], pair: Pair | None = None, trained=0, best=None
) -> dict:
    sizes = {n: a.size for n, a in parameters(model).items()}
    last = figures[-1]
    stages = [figure.perplexity for figure in figures] + [None] * (3 - len(figures))
    return {
        "method": name,
        "new": sum(sizes[n] for n in pair.extra) if pair else 0,
        "trained": trained,
        "tokens": last.tokens,
        "at the swap": stages[0] if pair else None,
        "after stage 1": stages[1],
        "after stage 2": stages[2],
        "perplexity": last.perplexity,
        "recovered": best["perplexity"] / last.perplexity if best else 1.0,
        **{f"recall {d}": share for d, share in last.recall.items()},
        "state bytes": state_bytes(model),
        **{f"ms at {n}": milliseconds(model, n) for n in CONTEXTS},
    }


def claims(rows: list[dict], minutes: float) -> list[record.Claim]:
    by_name = {row["method"]: row for row in rows}
    made = []
    for name, least in RECOVERED.items():
        share = by_name[name]["recovered"]
        made.append(record.Claim(f"{name} recovers at least {least:.0%}", f"{share:.1%}", share >= least))
    alone = by_name["swa_sink"]
    for distance in FAR:
        seen = {n: by_name[n][f"recall {distance}"] for n in ASKED if METHODS[n].stages}
        best = max(seen, key=lambda n: seen[n])
        ...
    return made
