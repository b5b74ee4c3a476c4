"""What linearizing costs in memory, and what it saves in decoding.

    python -m benchmarks.linearize     # two minutes on two cores

Memory is the teacher, and what a process of its own holds at most beyond it through the swap and a
stage of a few short rows: almost all of it is weights then. What it takes to load or to draw a
teacher is not in it. Decoding is timed in
turns, after so many tokens have been read; full attention has room for just those.
"""

import dataclasses
import gc
import multiprocessing
import pathlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from flax import nnx

import benchmarks.record as record
from benchmarks import linearize_pictures as pictures
from seqlab import heap
from seqlab.bench import timing
from seqlab.infer.session import Session
from seqlab.layers.mixers import attention
from seqlab.linearize import stage
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recipes import METHODS
from seqlab.linearize.swap import swap
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters
from seqlab.train.data import Data
from seqlab.train.sources import Text

DOCS = pathlib.Path(__file__).parent.parent / "docs"
TRAINED = ("liger", 0), ("lolcats", 0), ("lizard", 1)  # a method's stage: adapters, features
NUMBERS = 4  # in memory of a weight that trains: itself, its gradient, two moments
ALLOWED = 1.3
CONTEXTS = 256, 1024, 4096, 8192, 16_384
FLAT = 0.15  # that a student's tokens may take longer, late or early
STUDENTS = "liger", "lolcats", "lizard_rope"
STEPS, ROUNDS = 32, 8


def main() -> int:
    # one process each, which gives back what it frees: none has the memory of the one before
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        rows = list(pool.map(alone, TRAINED))
    heap.keep()
    worst = record.record("linearize_memory", rows, [within(row) for row in rows])
    times = decoded()
    pictures.decoding(DOCS, times)
    return max(worst, record.record("linearize_decode", times, flat(times)))


def alone(one: tuple[str, int]) -> dict[str, Any]:
    """`held`, in a process that has compiled and read text before."""
    held(*one, wide=64)
    return held(*one, wide=1024)


def held(method: str, number: int, wide: int) -> dict[str, Any]:
    """The most that memory holds while a stage trains, against what it has to hold."""
    one = dataclasses.replace(METHODS[method].stages[number], tokens=256, length=64, batch=1)
    teacher = small(wide).build(rngs=nnx.Rngs(0))
    sizes = {"teacher": sum(a.nbytes for a in parameters(teacher).values())}

    def linearize():
        pair = swap(teacher, PRESETS[METHODS[method].target], rngs=nnx.Rngs(0))
        adapted = stage.adapted(pair.student, one)
        mine = stage.trained(pair, adapted, one)
        sizes["trainable"] = NUMBERS * sum(parameters(adapted)[name].nbytes for name in mine)
        text = Text(("python:stdlib",), name="stdlib")
        with tempfile.TemporaryDirectory() as folder:
            stage.run(pair, one, Data((text,)), pathlib.Path(folder) / "1", say=lambda _: None)

    gc.collect()
    peak = sizes["teacher"] + timing.peak(linearize)
    return {
        "method": method,
        "stage": f"{number + 1}, {one.loss}",
        "bytes of the teacher": sizes["teacher"],
        "bytes of what trains": sizes["trainable"],
        "peak": peak,
        "peak over both": peak / sum(sizes.values()),
    }


def within(row: dict) -> record.Claim:
    says = f"{row['method']}, stage {row['stage']}: at most {ALLOWED} times teacher and trainable"
    return record.Claim(says, f"{row['peak over both']:.2f}", row["peak over both"] <= ALLOWED)


def small(wide: int, max_length: int = 128) -> lm.Config:
    mixer = attention.Config(heads=wide // 32, kv_heads=wide // 64, max_length=max_length)
    return lm.Config(vocab=257, d_model=wide, pattern=(mixer,), repeats=8)


def decoded() -> list[dict[str, Any]]:
    """Milliseconds per token of the teacher and of students, by the tokens read before."""
    teacher = small(128).build(rngs=nnx.Rngs(0))
    made = {name: swap(teacher, PRESETS[name], rngs=nnx.Rngs(0)).student for name in STUDENTS}
    rows = []
    for context in CONTEXTS:
        models = {"teacher": with_room(teacher, context + STEPS)} | made
        rows.append({"tokens read": context} | milliseconds(models, context))
    return rows


def with_room(model: lm.LM, tokens: int) -> lm.LM:
    """A transformer whose documents may have so many tokens."""
    pattern = tuple(dataclasses.replace(m, max_length=tokens) for m in model.config.pattern)
    config = dataclasses.replace(model.config, pattern=pattern)
    return bind(config.skeleton(), parameters(model))


def milliseconds(models: dict[str, lm.LM], context: int) -> dict[str, float]:
    """Of a token of each, after so many: the best of several rounds, taken in turns."""
    text = np.random.default_rng(0).integers(0, 256, context)
    sessions = {name: Session(model) for name, model in models.items()}
    for session in sessions.values():
        session.feed(text)
    laps = [
        {name: timing.lap(lambda s=s: s.fork().complete(STEPS))[0] for name, s in sessions.items()}
        for _ in range(ROUNDS)
    ]
    return {name: 1e3 / STEPS * min(one[name] for one in laps[1:]) for name in models}


def flat(rows: list[dict]) -> list[record.Claim]:
    made = []
    for name in STUDENTS:
        slower = rows[-1][name] / rows[0][name] - 1
        says = f"{name}: a token after {CONTEXTS[-1]:,} as after {CONTEXTS[0]:,}"
        made.append(record.Claim(says, f"{slower:+.0%}", abs(slower) < FLAT))
    grown = rows[-1]["teacher"] / rows[0]["teacher"]
    says = f"the teacher's takes longer after {CONTEXTS[-1]:,}"
    return [*made, record.Claim(says, f"{grown:.1f} times", grown > 1 + FLAT)]


if __name__ == "__main__":
    sys.exit(main())
