"""What linearizing costs in memory, and what it saves in decoding.

    python -m benchmarks.linearize     # two minutes on two cores

For memory see `benchmarks.linearize_memory`. Decoding is timed in
turns, after so many tokens have been read; full attention has room for just those.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
from flax import nnx

import benchmarks.record as record
from benchmarks import linearize_memory
from benchmarks import linearize_pictures as pictures
from seqlab import heap
from seqlab.bench import timing
from seqlab.infer.session import Session
from seqlab.layers.mixers import attention
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.swap import swap
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters

DOCS = pathlib.Path(__file__).parent.parent / "docs"
CONTEXTS = 256, 1024, 4096, 8192, 16_384
FLAT = 0.15  # that a student's tokens may take longer, late or early
STUDENTS = "liger", "lolcats", "lizard_rope"
STEPS, ROUNDS = 32, 8


def main() -> int:
    worst = linearize_memory.main()  # first: it is of processes of its own
    heap.keep()
    times = decoded()
    pictures.decoding(DOCS, times)
    return max(worst, record.record("linearize_decode", times, flat(times)))


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
    """One whose full attention may see so many tokens of a document."""

    def longer(block):
        mixer = getattr(block, "mixer", block)  # a block may be given as its mixer
        if not isinstance(mixer, attention.Config) or mixer.window is not None:
            return block
        mixer = dataclasses.replace(mixer, max_length=tokens)
        return dataclasses.replace(block, mixer=mixer) if hasattr(block, "mixer") else mixer

    c = model.config
    places = {"before": c.before, "pattern": c.pattern, "after": c.after}
    places = {name: tuple(map(longer, blocks)) for name, blocks in places.items()}
    return bind(dataclasses.replace(c, **places).skeleton(), parameters(model))


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
