"""Decoding 100,000 tokens: the same state, the same memory, the same time for each.

    python -m benchmarks.decode

Host overhead is what the tokens take longer in blocks of 64 steps, as they are generated, than as
one program. Expected on two CPU cores, in about a minute: all claims pass.
"""

import sys
import time
from collections.abc import Callable

import jax
from flax import nnx

import benchmarks.record as record
from seqlab.bench.machine import memory
from seqlab.infer.sample import Sampling
from seqlab.infer.session import Session
from seqlab.layers.registry import mixer_config
from seqlab.models import lm

FIRST, LAST, WINDOW = 100, 100_000, 9_990
STEPS, REPEATS = 1024, 40  # short and many: the best of them is undisturbed
SAMPLING = Sampling(temperature=1.0, top_p=0.95)


def main() -> int:
    config = lm.Config(
        vocab=257,
        d_model=64,
        pattern=(
            mixer_config("gla"),
            mixer_config("mamba2"),
            mixer_config("attention", window=64),
        ),
    )
    session = Session(config.build(rngs=nnx.Rngs(0)))
    session.feed([256])
    session.complete(FIRST - 1, SAMPLING)
    early, rows = session.fork(), []
    while session.position[0] < LAST:
        rows.append(measure(session))
        session.complete(WINDOW, SAMPLING)
    rows.append(measure(session))
    return record.record("decode", rows, claims(rows, early, session))


def measure(session: Session) -> dict:
    return {
        "token": int(session.position[0]),
        "state bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(session.state)),
        "process bytes": memory("VmRSS"),
        "us per token": 1e6 * seconds(session, 512) / 512,
    }


def claims(rows: list[dict], early: Session, late: Session) -> list[record.Claim]:
    state = rows[-1]["state bytes"] - rows[0]["state bytes"]
    grown = rows[-1]["process bytes"] / rows[0]["process bytes"] - 1
    before, after = side_by_side(lambda: seconds(early, STEPS), lambda: seconds(late, STEPS))
    slower = after / before - 1
    blocks, whole = side_by_side(
        lambda: seconds(early, STEPS), lambda: seconds(early, STEPS, STEPS)
    )
    overhead = 1e3 * (blocks - whole) / STEPS
    return [
        record.Claim("state at token 100,000 against 100", f"{state:+} bytes", state == 0),
        record.Claim("process memory, the same", f"{grown:+.2%}", abs(grown) < 0.02),
        record.Claim("time per token, the same", f"{slower:+.1%}", abs(slower) < 0.05),
        record.Claim("host overhead per token", f"{overhead:.4f} ms", overhead < 0.1),
    ]


def seconds(session: Session, steps: int, block: int = 64) -> float:
    """How long a copy of the session takes for so many steps, `block` to a program."""
    fork = session.fork()
    fork.block = block
    began = time.perf_counter()
    fork.complete(steps, SAMPLING)
    return time.perf_counter() - began


def side_by_side(one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float]:
    """The best time of each, taken in turns, so that other work on the machine disturbs both."""
    times = [(one(), other()) for _ in range(REPEATS)]
    return min(t for t, _ in times), min(t for _, t in times)


if __name__ == "__main__":
    sys.exit(main())
