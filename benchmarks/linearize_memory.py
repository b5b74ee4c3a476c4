"""What linearizing holds in memory at most, from reading the teacher to the stage's end.

    python -m benchmarks.linearize_memory     # or with all of benchmarks.linearize

Counted are the anonymous pages of a process of its own (Linux) beyond those it had when everything
was imported: arrays, what compiling leaves, and the text. A mapped file's pages are not among them,
for the system takes them back where it needs room; they are beside it. The teacher is small, so
that what each linearization takes once, compiling above all, is a tenth of it, and so is the batch:
what a step keeps of its tokens is the batch's, and no part of the model.
"""

import dataclasses
import gc
import multiprocessing
import pathlib
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
from flax import nnx

import benchmarks.record as record
from seqlab import heap
from seqlab.bench.machine import memory
from seqlab.layers import ffn
from seqlab.layers.mixers import attention
from seqlab.linearize import stage
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recipes import METHODS
from seqlab.linearize.swap import swap
from seqlab.models import lm, store
from seqlab.models.parameters import parameters
from seqlab.train.data import Data
from seqlab.train.sources import Text

TRAINED = ("liger", 0), ("lolcats", 0), ("lizard", 1)  # a method's stage: adapters, features
NUMBERS = 4  # in memory of a weight that trains: itself, its gradient, two moments
ALLOWED = 1.3
WIDE, DEEP, LENGTH, STEPS = 2048, 16, 32, 2
EVERY = 0.005  # seconds between two looks at the memory
TEXT = Text(("python:stdlib",), held_out=0.98, part="train", name="stdlib")


def main() -> int:
    rows = measured()
    return record.record("linearize_memory", rows, [within(row) for row in rows])


def measured() -> list[dict[str, Any]]:
    # one process each, which gives back what it frees: none has the memory of the one before
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool,
    ):
        pool.submit(draw, folder).result()
        return [pool.submit(held, folder, *one).result() for one in TRAINED]


def draw(folder: str) -> None:
    """Save a teacher of the sizes of Llama 3.2 1B, but for its vocabulary."""
    mixer = attention.Config(heads=WIDE // 64, kv_heads=WIDE // 256, max_length=128)
    sizes = {"d_model": WIDE, "ffn": ffn.Config(width=4 * WIDE), "repeats": DEEP}
    config = lm.Config(vocab=257, pattern=(mixer,), **sizes)
    store.save(config.build(rngs=nnx.Rngs(0)), f"{folder}/teacher")


def held(folder: str, method: str, number: int) -> dict[str, Any]:
    """The most that memory holds while a stage trains, against what it has to hold."""
    heap.keep()  # as `seqlab linearize` does
    tokens = STEPS * LENGTH
    one = dataclasses.replace(METHODS[method].stages[number], tokens=tokens, length=LENGTH, batch=1)
    sizes = {}

    def linearize():
        teacher = store.load(f"{folder}/teacher")
        sizes["teacher"] = sum(a.nbytes for a in parameters(teacher).values())
        pair = swap(teacher, PRESETS[METHODS[method].target], rngs=nnx.Rngs(0))
        student = jax.eval_shape(lambda student: stage.adapted(student, one), pair.student)
        mine, shapes = stage.trained(pair, student, one), parameters(student)
        sizes["trainable"] = NUMBERS * 4 * sum(shapes[name].size for name in mine)
        run = pathlib.Path(folder) / method
        stage.run(pair, one, Data((TEXT,)), run, say=lambda _: None)

    own, mapped = peak(linearize)
    return {
        "method": method,
        "stage": f"{number + 1}, {one.loss}",
        "bytes of the teacher": sizes["teacher"],
        "bytes of what trains": sizes["trainable"],
        "peak": own,
        "mapped beside it": mapped,
        "peak over both": own / sum(sizes.values()),
    }


def peak(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes of anonymous and of mapped pages, at most while it works, beyond those before."""
    jax.devices()  # the client's own memory is there whatever is done
    gc.collect()
    fields, done = ("RssAnon", "RssFile"), threading.Event()
    before = [memory(field) for field in fields]
    most = list(before)

    def look():
        while not done.wait(EVERY):
            most[:] = [max(m, memory(field)) for m, field in zip(most, fields, strict=True)]

    looking = threading.Thread(target=look)
    looking.start()
    try:
        work()
    finally:
        done.set()
        looking.join()
    own, mapped = (m - b for m, b in zip(most, before, strict=True))
    return own, mapped


def within(row: dict) -> record.Claim:
    says = f"{row['method']}, stage {row['stage']}: at most {ALLOWED} times teacher and trainable"
    return record.Claim(says, f"{row['peak over both']:.2f}", row["peak over both"] <= ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
