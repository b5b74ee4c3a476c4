"""Every way to linearize, on one small teacher: what is left of its text and of its recall.

    python -m benchmarks.linearize_demo            # 20 minutes on two idle cores, 12 the next time
    python -m benchmarks.linearize_demo --go-on    # keep what an interrupted run has finished
    python -m benchmarks.linearize_demo --draw     # the pictures alone, from results/linearize.json
    python -m benchmarks.linearize_demo --long     # the methods that much is asked of, for longer

The teacher is a transformer over bytes, behind one short convolution: with it, copying is found
out sooner. It learns that from short pieces of text said over and over, then from lines of a table
with little between them, then far from one another; then it reads the standard library's sources,
and in a tenth of its rows such lines. It is trained once and stays in runs/linearize_demo/teacher;
students are made anew, side by side with a core each. A demo, not a test: what its claims come to
is printed, and it exits with 0.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import sys
import time
from typing import Any, NamedTuple

from flax import nnx

import benchmarks.record as record
from benchmarks import cores
from benchmarks import linearize_pictures as pictures
from benchmarks.linearize import milliseconds, with_room
from seqlab import heap
from seqlab.bench import machine
from seqlab.layers import ffn
from seqlab.layers.mixers import attention, gated_conv
from seqlab.linearize import recall, stage
from seqlab.linearize.measure import Judge
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recipes import METHODS, Lora, Stage
from seqlab.linearize.swap import swap
from seqlab.models import lm, store
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
TEACHER = OUT / "teacher"
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
TOKENS, MORE = 300_000, 1_000_000  # a stage

#: What the papers give for billions of parameters and 20M tokens, made fit for a thousandth: many
#: steps of few tokens each, and adapters of a quarter of the width.
FEWER = {"length": LENGTH, "batch": 1, "warmup": 0.05, "schedule": "cosine"}
RATES = {"layer": 2e-2, "ce": 4e-3}
ADAPTERS = Lora(rank=32, alpha=64.0)

STDLIB: dict[str, Any] = {"files": ("python:stdlib",), "held_out": 0.03}
BYTES = ByteTokenizer()


class Lesson(NamedTuple):
    """A run of the teacher: `share` of the rows, of `length` bytes, are documents of recall."""

    length: int
    share: float
    steps: int
    optimizer: Optimizer
    asked: dict[str, Any]  # of `recall.write`


BETAS = 0.9, 0.98
HIGH = Optimizer(lr=5e-3, betas=BETAS, warmup=30, schedule="constant")
LOWER = Optimizer(lr=3e-3, betas=BETAS, warmup=10, schedule="constant")
COSINE = Optimizer(lr=3e-3, betas=BETAS, warmup=30)
LESSONS = {
    "copying": Lesson(128, 0.75, 300, HIGH, {"documents": 8000, "gap": None}),
    "lines": Lesson(128, 0.8, 160, LOWER, {"documents": 8000, "gap": 4}),
    "far": Lesson(LENGTH, 0.8, 80, LOWER, {"documents": 1000, "gap": 20, "far": True}),
    "text": Lesson(LENGTH, 0.1, 240, COSINE, {"documents": 1000, "gap": 40, "far": True}),
}

MODEL = lm.Config(
    vocab=BYTES.vocab,
    d_model=128,
    before=(gated_conv.Config(conv_width=8),),
    pattern=(attention.Config(heads=4, kv_heads=2, max_length=LENGTH),),
    repeats=4,
    ffn=ffn.Config(ratio=8 / 3),
)


def main(words: list[str]) -> int:
    asked = argparse.ArgumentParser()
    for flag in ("--draw", "--go-on", "--long"):
        asked.add_argument(flag, action="store_true")
    asked.add_argument("--of", help="the row of one model alone, as the others' runs are begun")
    asked.add_argument("--core", type=int, help="of that run")
    options = asked.parse_args(words)
    if options.draw:
        told = json.loads((record.RESULTS / "linearize.json").read_text())
        pictures.draw(DOCS, told["rows"])
        return 0
    heap.keep()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(OUT / "compiled"))  # for the next run
    folder = OUT / ("long" if options.long else "students")
    if options.of:
        if options.core is not None:
            cores.settle(options.core)
        return of_one(options.of, folder / options.of, MORE if options.long else TOKENS)
    if not options.go_on:
        shutil.rmtree(folder, ignore_errors=True)
    taught()
    print(f"The teacher is there after {busy():.1f} busy minutes.", flush=True)
    rows = {}

    def done(name: str) -> None:
        rows[name] = json.loads((folder / name / "row.json").read_text())
        print(f"{name}: {summary(rows[name])}; {busy():.1f} busy minutes so far.", flush=True)

    program = ["benchmarks.linearize_demo", *(["--long"] if options.long else []), "--of"]
    names = ["teacher", *(RECOVERED if options.long else STUDENTS)]
    cores.run({name: [*program, name] for name in names}, folder, done)
    table = [rows[name] for name in names]
    for row in table:
        row["recovered"] = rows["teacher"]["perplexity"] / row["perplexity"]
    if options.long:
        record.record("linearize_long", table, recovered(table))
        return 0
    for to in (OUT, DOCS):
        pictures.draw(to, table)
    record.record("linearize", table, [*recovered(table), *recalled(table), within(busy())])
    return 0


def busy() -> float:
    """Minutes that this and its children had of all cores together."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + children.ru_utime + children.ru_stime
    return seconds / 60 / machine.cores()


def taught() -> None:
    """Have the teacher take its lessons; what is there of them already is kept."""
    before: dict[str, Any] = {}
    for name, lesson in LESSONS.items():
        text = sources(name)[0]
        recall.write(OUT / f"{name}.jsonl", text, length=lesson.length - 2, **lesson.asked)
        every = {"evaluate_every": 0, "checkpoint": Checkpoint(every=50)}
        config = Config(MODEL, mixture(name), lesson.steps, lesson.optimizer, **every, **before)
        train(config, TEACHER / name)
        before = {"start": str(TEACHER / name)}


def sources(name: str) -> tuple[Text, Jsonl]:
    """The library's sources, and documents of recall lines."""
    share = LESSONS[name].share
    text = Text(**STDLIB, part="train", weight=1 - share, name="stdlib")
    return text, Jsonl((str(OUT / f"{name}.jsonl"),), weight=share, name="recall")


def mixture(name: str) -> Data:
    length = LESSONS[name].length
    return Data(
        train=sources(name),
        held_out=(Text(**STDLIB, part="held_out", name="stdlib"),),
        length=length,
        batch=4 * LENGTH // length,
        held_out_rows=HELD_OUT_ROWS * LENGTH // length,
    )


def of_one(name: str, folder: pathlib.Path, tokens: int) -> int:
    """Write the row of the teacher or of a student to its folder, unless it is there."""
    if (folder / "row.json").exists():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    data, teacher = mixture("text"), store.load(TEACHER / "text")
    with use_mesh() as mesh:
        filler = BYTES.encode(held_out_text(data).decode())
        ask = lambda model: recall.recall(model, BYTES, filler, count=32, say=lambda text: None)
        judge = Judge(held_out_batches(data, BYTES), mesh, ask)
        if name == "teacher":
            row = of_teacher(teacher, judge)
        else:
            row = of_student(name, teacher, data, judge, tokens, folder)
    (folder / "row.json").write_text(json.dumps(row))
    return 0


def of_teacher(teacher: lm.LM, judge: Judge) -> dict[str, Any]:
    figures = judge.teacher(teacher)
    row = dict.fromkeys(("new", "trained", "tokens"), 0)
    row |= dict.fromkeys(("at the swap", "after stage 1", "after stage 2"))
    return measured("teacher", row, figures, teacher, decoding(teacher))


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
        folder = runs / f"{number}-{one.loss}"
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
    adapters = one.lora and dataclasses.replace(ADAPTERS, on=one.lora.on)
    return dataclasses.replace(one, **FEWER, tokens=tokens, lr=RATES[one.loss], lora=adapters)


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
    return f"perplexity {row['perplexity']:.3f}, recall {', '.join(recalled)}"


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
