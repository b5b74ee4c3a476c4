"""Training whole models beside transformers' of equal shape and equal weights, in one run.

    python -m benchmarks.training [NAME | NAME@TOKENS ...]

Six layers of width 512, two rows, float32 on the CPU, with clipping and AdamW. A model that
transformers trains token by token is raced at a length that it finishes. Measured in turns;
medians count. Where other work keeps the cores busy, claims go by CPU seconds, and it is best
to give both sides one core (`taskset -c 0 python -m ...`): threads that wait for a core spin.
The peer `mamba.py` needs the package `mambapy`, which no other part of seqlab uses.
"""

import os
import sys

from seqlab import heap

heap.keep()  # as `seqlab train` does, and before any thread is there; it serves both sides

import numpy as np  # noqa: E402

import benchmarks.record as record  # noqa: E402
from benchmarks import published  # noqa: E402
from seqlab.bench import machine, timing  # noqa: E402

LAYERS, BATCH = 6, 2
#: Tokens a row, and rounds.
RACES = {
    "mamba": (256, 3),
    "mamba, mamba.py": (512, 3),
    "mamba2": (2048, 3),
    "xlstm": (2048, 6),
    "qwen3_next": (2048, 3),
    "llama": (2048, 6),
}


def main(names: list[str]) -> int:
    rows = [row for name in names or RACES for row in measure(name)]
    if not rows:
        return 1
    return record.record("training", rows, [record.claim(row) for row in rows])


def measure(name: str) -> list[dict]:
    name, _, tokens = name.partition("@")
    length, rounds = RACES[name]
    length = int(tokens or length)
    pair = published.pair(name, LAYERS, length)
    if pair is None:
        return []
    ours, our_bytes = published.our_training(pair.ours, BATCH, length)
    theirs = published.their_training(pair.theirs, BATCH, length)
    their_bytes = timing.peak(theirs)
    laps = timing.race({"ours": ours, "theirs": theirs}, rounds)
    speed = lambda who: BATCH * length / float(np.median(laps[who].seconds))
    row = {
        "model": name,
        "peer": "transformers",
        "cores": machine.cores(),
        "tokens a row": length,
        "our tokens/s": speed("ours"),
        "their tokens/s": speed("theirs"),
        **timing.ratios(laps["theirs"], laps["ours"]),
        "our bytes for a step": our_bytes,
        "their bytes for a step": their_bytes,
        "load": os.getloadavg()[0],
    }
    print(row, flush=True)
    return [row]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
