"""The layer loss: each new mixer is shown what the teacher's reads, and matches what it returns.

One pass of the teacher trains all layers at once (teacher forcing): as the residual stream is the
teacher's everywhere, no gradient leaves a mixer. LoLCATs (Zhang et al., 2024), RADLADS (Goldstein
et al., 2025), MOHAWK's second stage (Bick et al., 2024).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import widen
from seqlab.layers import auxiliary
from seqlab.layers.mixer import Mixer
from seqlab.models.layout import stacks
from seqlab.models.lm import LM
from seqlab.train.objective import Asked
from seqlab.train.step import Loss


class Models(NamedTuple):
    """What a loss is asked of; no teacher where it needs none."""

    teacher: Any  # an LM
    student: LM


class Distance(NamedTuple):
    """Sums of squares over channels: of the difference to the teacher, and of the teacher."""

    error: jax.Array  # [B, T] float32
    size: jax.Array  # [B, T] float32

    def relative(self, counts: jax.Array) -> jax.Array:
        """The mean square of the difference over that of the teacher, of the tokens that count."""
        mean = lambda a: jnp.sum(jnp.where(counts, a, 0.0))
        return mean(self.error) / jnp.maximum(mean(self.size), jnp.finfo(jnp.float32).tiny)


def distance(ours: jax.Array, teachers: jax.Array) -> Distance:
    """Of [B, T, D] each."""
    ours, teachers = widen(ours), widen(teachers)
    return Distance(jnp.sum(jnp.square(ours - teachers), -1), jnp.sum(jnp.square(teachers), -1))


def layer(models: Models, asked: Asked) -> Loss:
    """The mean over replaced layers of their relative errors; each is seen as `layer_N`, N its
    place in the depth of the model."""
    watched, counts = _watched(models), asked.weights > 0
    with auxiliary.collect():  # what the teacher's layers add is nobody's loss here
        _, states = watched.hidden(asked.tokens, reset=asked.reset)
    errors = {
        f"layer_{depth}": found.relative(counts)
        for depth, found in _by_depth(watched, states).items()
    }
    tokens = jnp.sum(counts)
    seen = {name: tokens * error for name, error in errors.items()}
    return Loss(sum(seen.values(), start=jnp.zeros(())) / max(len(seen), 1), tokens, seen)


class _Watched(Mixer):
    """The teacher's mixer, in a student's company: what it hands on as its state is how far the
    student's output is from its own, before the output projection where both can tell."""

    def __init__(self, teacher: Any, student: Any):
        self.teacher, self.student = teacher, student
        self.shares = student.shares  # of the student's layers: the teacher's have none of it

    def init_state(self, batch: int):
        return self.teacher.init_state(batch)

    def mix(self, x, state, reset, *shared):
        teacher, student = self.teacher, self.student
        empty = student.init_state(len(x))
        if not _heads_compare(teacher, student):
            y, _ = teacher.mix(x, state, reset)
            ours, _, *shared = student.mix(x, empty, reset, *shared)
            return y, distance(ours, y), *shared
        y, _ = teacher.attend(x, state, reset)
        ours, _ = student.attend(x, empty, reset)
        return teacher.leave(x, y), distance(ours, y), *shared


def _heads_compare(teacher, student) -> bool:
    """Whether both have `attend`, of one width."""
    if not (hasattr(teacher, "attend") and hasattr(student, "attend")):
        return False
    return teacher.out.weight.shape[0] == student.out.weight.shape[0]


def _watched(models: Models) -> LM:
    """The teacher, with every mixer watched that is another in the student."""
    watched = jax.tree.map(lambda a: a, models.teacher)
    for here, there in zip(_blocks(watched), _blocks(models.student), strict=True):
        if here.config.mixer != there.config.mixer:
            here.mixer = _Watched(here.mixer, there.mixer)
    return watched


def _blocks(model: LM) -> list:
    return [*model.before, *model.blocks, *model.after]


def _by_depth(model: LM, states) -> dict[int, Distance]:
    """Of every layer that was watched."""
    return {
        depth: jax.tree.map(lambda a: a[repeat], state.mixer)
        for state, stack in zip(states, stacks(model.config), strict=True)
        if isinstance(state.mixer, Distance)
        for repeat, depth in enumerate(stack)
    }
