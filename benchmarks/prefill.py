"""Reading a prompt of a million tokens from a file takes the memory of reading ten thousand.

    python -m benchmarks.prefill

Each length runs in a process of its own. Expected on two CPU cores, in a few minutes: it passes.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from flax import nnx

import benchmarks.record as record
from seqlab.bench.machine import memory
from seqlab.infer import text
from seqlab.infer.session import Session
from seqlab.layers.registry import mixer_config
from seqlab.models import lm
from seqlab.models.tokenizer import ByteTokenizer

LENGTHS = (10_000, 1_000_000)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        rows = [in_a_process(pathlib.Path(folder), length) for length in LENGTHS]
    grown = rows[-1]["peak bytes"] / rows[0]["peak bytes"] - 1
    says = "peak memory, a million tokens against ten thousand"
    return record.record("prefill", rows, [record.Claim(says, f"{grown:+.2%}", bool(grown < 0.1))])


def in_a_process(folder: pathlib.Path, length: int) -> dict:
    path = folder / f"{length}.txt"
    letters = np.random.default_rng(0).integers(ord("a"), ord("z"), length, np.uint8)
    path.write_bytes(letters.tobytes())
    command = [sys.executable, "-m", "benchmarks.prefill", str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measure(path: str) -> dict:
    config = lm.Config(vocab=257, d_model=64, pattern=(mixer_config("gla"), mixer_config("mamba2")))
    session, tokenizer = Session(config.build(rngs=nnx.Rngs(0))), ByteTokenizer()
    began = time.perf_counter()
    session.feed(np.array(tokenizer.encode(piece), np.int32) for piece in text.read(path))
    seconds = time.perf_counter() - began
    return {
        "tokens": int(session.position[0]),
        "peak bytes": memory("VmHWM"),
        "state bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(session.state)),
        "tokens/s, with compilation": float(session.position[0] / seconds),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        sys.exit(main())
