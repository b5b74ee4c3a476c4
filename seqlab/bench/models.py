"""Models of one size that differ in their mixers, softmax attention first."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.bench.sizes import combinations
from seqlab.compare import entries
from seqlab.layers.registry import mixer_config
from seqlab.models import lm
from seqlab.settings import STRICT
from seqlab.train import config as runs

SOFTMAX = "softmax attention"
VOCAB, HEAD = 257, 64  # token ids; the width of a head of softmax attention


@dataclass(frozen=True, config=STRICT)
class Size:
    """L layers of width D, each a mixer and a SwiGLU; B rows of T tokens, or of a context of T. A
    prompt is read C tokens at a time."""

    D: PositiveInt = 512
    L: PositiveInt = 6
    B: PositiveInt = 1
    T: PositiveInt = 1024
    C: PositiveInt = 512


class Entry(NamedTuple):
    label: str
    config: lm.Config


def sizes(fields: Iterable[str]) -> list[Size]:
    """Every combination of the fields; on an accelerator models are wider and deeper."""
    plain = Size() if jax.default_backend() == "cpu" else Size(D=1024, L=12)
    return combinations(plain, fields, "size")


def entered(mixers: str, size: Size) -> list[Entry]:
    """Softmax attention and the mixers of "a,b(heads=2)", with room for documents of T tokens.
    Raises ConfigError for a mixer that is not there or does not fit."""
    named = [(SOFTMAX, softmax(size.D, size.T)), *entries.mixers(mixers, size.T)]
    made = [Entry(label, _model(mixer, size)) for label, mixer in named]
    for entry in made:
        entry.config.skeleton()
    return made


def of_run(run: runs.Config, label: str) -> list[Entry]:
    """A run's model, and the same with softmax attention for each of its mixers."""
    model = run.model
    plain = softmax(model.d_model, run.data.length)
    swapped = {
        name: tuple(_with(model.block(entry), plain) for entry in getattr(model, name))
        for name in ("before", "pattern", "after")
    }
    return [Entry(SOFTMAX, dataclasses.replace(model, **swapped)), Entry(label, model)]


def softmax(d_model: int, length: int) -> Any:
    """Full attention with heads 64 wide, or one where that does not divide the width."""
    heads = d_model // HEAD if d_model % HEAD == 0 else 1
    return mixer_config("attention", heads=heads, max_length=length)


def built(config: lm.Config) -> lm.LM:
    return jax.jit(lambda: config.build(rngs=nnx.Rngs(0)))()


def text(size: Sequence[int], vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, size, np.int32)


def _model(mixer: Any, size: Size) -> lm.Config:
    return lm.Config(vocab=VOCAB, d_model=size.D, pattern=(mixer,), repeats=size.L)


def _with(block: Any, mixer: Any) -> Any:
    return block if block.mixer is None else dataclasses.replace(block, mixer=mixer, beside=None)
