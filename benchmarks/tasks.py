"""Every mixer on associative recall, small enough for two cores, and what published memories reach.

    python -m benchmarks.tasks            # twenty minutes on two cores
    python -m benchmarks.tasks --go-on    # keep what an interrupted run has finished
    python -m benchmarks.tasks --draw     # the pictures alone, from results/tasks.json

One process a core; each takes the next mixer that no other has. 128 ids, 8 pairs in 64 tokens, then
16 pairs in 128 without training on them; width 64, Zoology's two layers, one seed, one rate. The
four with a target get the steps that it was measured with, all others fewer, the same for all.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import benchmarks.record as record
from seqlab import heap
from seqlab.compare import command, pictures, published, report
from seqlab.compare.live import Board
from seqlab.compare.results import Result, Run
from seqlab.layers.registry import mixer_config, own_mixers
from seqlab.tasks import Accuracy, protocol

OUT = pathlib.Path("runs/tasks")
DOCS = pathlib.Path(__file__).parent.parent / "docs"
SHORT, LONG = "64/8", "128/16"
ALLOWED = 0.05  # below a target
MINUTES = 20
STEPS = 300  # of those without a target

#: What a reference implementation reached: the entry, its name in pictures, steps, accuracies.
TARGETS = (
    ("attention(heads=2,rope_base=null)", "softmax, no positions", 600, 0.993, 0.988),
    (
        "linear_attention(heads=1,expand_k=0.125,feature_map.kind=taylor)",
        "Based",
        600,
        0.980,
        0.928,
    ),
    ("delta_net(heads=2)", "DeltaNet", 300, 0.980, 0.925),
    ("linear_attention(heads=2)", "linear attention, elu", 600, 0.934, 0.867),
)

#: Memories too small for the task: one alone, and four of the same size beside one that all tokens
#: use, as MoM was published; a token uses two of the four.
SMALL = "base=linear,heads=2,key_dim=4,value_dim=32,conv_width=0"
ONE = f"mom(memories=1,top_k=1,shared_memory=false,{SMALL})"
FOUR = f"mom(memories=4,top_k=2,{SMALL})"
SMALL_STEPS = 600

NAMES = {entry: name for entry, name, *_ in TARGETS} | {
    ONE: "one small memory",
    FOUR: "MoM of four of them",
}

#: Two heads, as in Zoology, with all of the width in them.
TWO_HEADS = "heads=2"
FIELDS = {
    "gated_delta_net": "key_heads=2,value_heads=2,key_dim=32,value_dim=32",
    "kda": "heads=2,key_dim=32,value_dim=32",
    "hgrn2": "key_dim=32",
    "mamba2": "head_dim=64",
}


def main(options: list[str]) -> int:
    if "--draw" in options:
        return draw(read())
    if "--worker" in options:
        place, of = map(int, options[-1].split("/"))
        return work(place, of)
    if "--go-on" not in options:
        shutil.rmtree(OUT, ignore_errors=True)
    began = time.monotonic()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # several processes would fight for one GPU
    cores = sorted(os.sched_getaffinity(0))[:4]
    workers = [worker(f"{place}/{len(cores)}", core) for place, core in enumerate(cores)]
    codes = [process.wait() for process in workers]
    if any(codes):
        return max(codes)
    return tell(finished(), (time.monotonic() - began) / 60)


def worker(place: str, core: int) -> subprocess.Popen:
    """A process of its own on one core: steps this small gain nothing from a second one."""
    command = [sys.executable, "-m", "benchmarks.tasks", "--worker", place]
    return subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, {core}))


def work(place: int, of: int) -> int:
    """Train whatever no other process has, each process beginning at another place."""
    heap.keep()
    asked = [comparison(entry, steps) for entry, steps in entries().items()]
    start = place * len(asked) // of
    for one in (*asked[start:], *asked[:start]):
        (entry,) = one.entries
        if one.missing(one.kept(entry)):
            one.train(Board([NAMES.get(entry.name, entry.name)]))
    return 0


def entries() -> dict[str, int]:
    """Every entry and its steps."""
    given = {label: steps for label, _, steps, *_ in TARGETS}
    named = {label.partition("(")[0] for label in given}
    rest = {with_fields(name): STEPS for name in own_mixers() if name not in named}
    return given | {ONE: SMALL_STEPS, FOUR: SMALL_STEPS} | rest


def with_fields(name: str) -> str:
    fields = FIELDS.get(name, TWO_HEADS if hasattr(mixer_config(name), "heads") else "")
    return f"{name}({fields})" if fields else name


def comparison(label: str, steps: int) -> command.Comparison:
    return command.ask("mqar", label, out=OUT, budget=f"{steps} steps")


def finished() -> list[Result]:
    asked = [comparison(label, steps) for label, steps in entries().items()]
    return [result for one in asked for result in one.finished()]


def tell(found: list[Result], minutes: float) -> int:
    """The page, the pictures, the table and the verdicts; 0 if all of them hold."""
    named = [dataclasses.replace(r, label=NAMES.get(r.label, r.label)) for r in found]
    facts = {"Steps": f"as the table says: {STEPS}, or those of a target", "Rate": "0.01"}
    print(report.write(OUT, named, "mqar", protocol("mqar"), facts))
    draw(named)
    ordered = sorted(named, key=lambda r: -r.accuracy if r.best[0].tests else 1.0)
    return record.record("tasks", [row(result) for result in ordered], claims(found, minutes))


def row(result: Result) -> dict:
    run = result.best[0]
    return {
        "mixer": result.label,
        "steps": run.steps,
        "parameters": result.parameters,
        "state bytes": result.state_bytes,
        SHORT: result.test(SHORT).mean if run.tests else None,
        LONG: result.test(LONG).mean if run.tests else None,
        "loss": run.loss,
        "seconds": round(run.seconds, 1),
        "CPU seconds": round(run.cpu_seconds, 1),
    }


def claims(found: list[Result], minutes: float) -> list[record.Claim]:
    by_label = {result.label: result for result in found}
    made = []
    for label, name, _, *targets in TARGETS:
        for test, target in zip((SHORT, LONG), targets, strict=True):
            reached = by_label[label].test(test).mean
            says = f"{name}, {test}: at least {target:.3f} - {ALLOWED}"
            made.append(record.Claim(says, f"{reached:.3f}", reached >= target - ALLOWED))
    one, four = by_label[ONE].accuracy, by_label[FOUR].accuracy
    says = "MoM of 4 memories, top 2, above its base mixer with one such memory"
    made.append(record.Claim(says, f"{four:.3f} and {one:.3f}", four > one))
    there = {label.partition("(")[0] for label in by_label}
    made.append(
        record.Claim("every mixer is in the table", f"{len(there)}", there >= set(own_mixers()))
    )
    says = f"within {MINUTES} minutes"
    return [*made, record.Claim(says, f"{minutes:.1f}", minutes <= MINUTES)]


def read() -> list[Result]:
    """What `row` told."""
    found = json.loads((record.RESULTS / "tasks.json").read_text())["rows"]
    return [restored(told) for told in found]


def restored(told: dict) -> Result:
    tests = {t: Accuracy(told[t], 0.0) for t in (SHORT, LONG) if told[t] is not None}
    seconds = told["seconds"], told["CPU seconds"]
    run = Run(0.01, 0, told["steps"], *seconds, told["loss"], tests, None if tests else 0)
    return Result(told["mixer"], 64, {}, {}, told["parameters"], told["state bytes"], (run,))


def draw(found: list[Result]) -> int:
    """The pictures of the documentation."""
    pictures.draw(DOCS, found, [SHORT, LONG], published.points("mqar"), [SHORT])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
