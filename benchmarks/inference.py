"""Whole models beside transformers' in reading a prompt and in decoding after it.

    python -m benchmarks.inference [NAME ...]

Six layers of width 512, one row, a prompt of 2,048 tokens, float32 on the CPU, in turns. Raced are
those that transformers reads faster than token by token, and decodes without packages of kernels.
Attention has room for what is read and written here; a step reads all of it once half is filled.
"""

import sys

from seqlab import heap

heap.keep()  # as `seqlab generate` does, and before any thread is there; it serves both sides

import torch  # noqa: E402

import benchmarks.record as record  # noqa: E402
from benchmarks import aims, published  # noqa: E402
from seqlab.bench import timing  # noqa: E402
from seqlab.infer.session import Session  # noqa: E402

NAMES, LAYERS, LENGTH, ROUNDS = ("llama", "mamba2"), 6, 2048, 5
STEPS = 64  # a block of a session, unless it is told otherwise
ROOM = LENGTH + 8 * STEPS  # of all rounds, and a little more


def main(names: list[str]) -> int:
    rows = [row for name in names or NAMES for row in measure(name, LAYERS, LENGTH)]
    if not rows:
        return 1
    return record.record("inference", rows, [record.claim(row) for row in rows])


def measure(name: str, layers: int, length: int) -> list[dict]:
    pair = published.pair(name, layers, ROOM)
    if pair is None:
        return []
    ours, theirs = our(pair.ours, length), their(pair.theirs, length)
    return [record.raced(name, "transformers", w, length, ours[w], theirs[w], ROUNDS) for w in ours]


def our(model, length: int) -> dict[str, timing.Work]:
    """Reading a prompt, and STEPS of decoding after one."""
    ids = published.tokens(1, length)[:, :-1]
    session = Session(model)
    session.feed(ids)

    def prefill() -> None:
        Session(model).feed(ids)

    return {aims.PREFILL: prefill, aims.DECODE: lambda: session.complete(STEPS)}


def their(model, length: int) -> dict[str, timing.Work]:
    ids = torch.from_numpy(published.tokens(1, length)[:, :-1]).long()

    def prefill() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True)

    return {aims.PREFILL: prefill, aims.DECODE: published.their_decoding(model, ids, STEPS)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
