"""`seqlab bench prefill` and `seqlab bench decode`: reading a prompt, a step after a context."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.bench import machine, models
from seqlab.bench.ceilings import COPY, Ceilings
from seqlab.bench.contestants import gather, size_of
from seqlab.bench.models import SOFTMAX, Entry, Size
from seqlab.bench.record import Row
from seqlab.bench.timing import Laps, Work, figure, race, ratio, spread
from seqlab.errors import ModelError
from seqlab.infer import decode as programs
from seqlab.infer.decode import Carry
from seqlab.infer.sample import GREEDY, row_keys
from seqlab.infer.session import Session
from seqlab.layers.mixer import State
from seqlab.models import lm
from seqlab.models.parameters import parameters

STEPS = 8  # of decoding in a lap
_POSITION = jax.tree_util.GetAttrKey("position")  # of what keeps tokens, in its state


class Reader(NamedTuple):
    """`state` is the bytes of one sequence, `least` what a step reads and writes of weights and
    states in a device's memory."""

    work: Work
    state: int
    least: int = 0


def prompt(config: lm.Config, size: Size) -> Reader:
    """Reads B prompts of T tokens from the beginning, C at a time."""
    skeleton = config.skeleton()
    state = _state(skeleton, size.B)
    machine.fit(size_of(skeleton) + 3 * size_of(state), machine.room())
    model, ids = models.built(config), models.text((size.B, size.T), config.vocab)

    def work() -> object:
        session = Session(model, chunk_size=size.C)
        session.feed(ids)
        return session.position

    return Reader(work, size_of(state) // size.B)


def steps(config: lm.Config, size: Size) -> Reader:
    """The last STEPS of T tokens for B rows."""
    skeleton = config.skeleton()
    structure, params = jax.tree.structure(skeleton), parameters(skeleton)
    state, row = _state(skeleton, size.B), jnp.zeros(size.B, jnp.int32)
    carry = jax.eval_shape(lambda state: Carry(state, _logits(size, config)), state)
    ids = jnp.zeros(0, jnp.int32)
    rest = (row, row + STEPS, row, row_keys(0, size.B), ids, GREEDY.numbers)
    arguments = structure, params, carry, *rest
    if size.T < STEPS:
        raise ModelError(f"A context of {size.T} is too short: {STEPS} steps are timed; raise T.")
    program = programs.decode.lower(*arguments, top_k=None, block=STEPS).compile()
    machine.require(program, size_of(params) + size_of(carry))
    model = models.built(config)
    params, state = parameters(model), jax.jit(lambda model: model.init_state(size.B))(model)
    held = [Carry(state, _logits(size, config))]

    def work() -> object:
        state, logits = held.pop()
        carry, done = program(params, Carry(after(state, size.T - STEPS), logits), *rest)
        held.append(carry)
        if int(done.counts.min()) < STEPS:  # where logits are not numbers, a row ends
            raise ModelError(f"After {size.T} tokens the model's logits are not numbers.")
        return done

    passes = 1 if skeleton.max_length else 2  # keys and values are read; a memory is written too
    return Reader(work, size_of(state) // size.B, size_of(params) + passes * size_of(state))


def prefill(entries: Sequence[Entry], size: Size, rounds: int, top: Ceilings) -> list[Row]:
    """A row for each model: tokens a second, against softmax attention."""
    made, absent = _gathered(prompt, entries, size)
    laps = race({name: one.work for name, one in made.items()}, rounds)
    tokens = size.B * size.T
    rows = []
    for name, one in made.items():
        speed = figure("tokens/s", spread(tokens / laps[name].seconds))
        rows.append(_about(size, name) | speed | _against(laps, name) | {"state bytes": one.state})
    return rows + absent


def decode(entries: Sequence[Entry], size: Size, rounds: int, top: Ceilings) -> list[Row]:
    """A row for each model: the time of a step of all rows, against softmax attention and against
    the least time in which a copy moves the bytes of weights and states."""
    made, absent = _gathered(steps, entries, size)
    laps = race(top.works | {name: one.work for name, one in made.items()}, rounds)
    rows = []
    for name, one in made.items():
        seconds = laps[name].seconds / STEPS
        least = one.least / top.bytes * laps[COPY].seconds
        rows.append(
            _about(size, name)
            | figure("us a step", spread(1e6 * seconds))
            | figure("tokens/s", spread(size.B / seconds))
            | _against(laps, name)
            | {"state bytes": one.state, "bytes": one.least}
            | figure("times the least", ratio(seconds, least))
            | top.row(laps)
        )
    return rows + absent


def _gathered(make: Callable[[lm.Config, Size], Reader], entries: Sequence[Entry], size: Size):
    makers = {entry.label: functools.partial(make, entry.config, size) for entry in entries}
    return gather(makers, functools.partial(_about, size))


def _about(size: Size, name: str) -> Row:
    return {"model": name, "batch": size.B, "context": size.T}


def _against(laps: dict[str, Laps], name: str) -> Row:
    if SOFTMAX not in laps:
        return {}
    return figure("against softmax", ratio(laps[SOFTMAX].seconds, laps[name].seconds))


def after(state: State, tokens: int) -> State:
    """The state where it stands after so many tokens. A step takes as long whatever it keeps of
    them, but only what is there is read."""

    def placed(path, leaf):
        return np.full_like(leaf, tokens) if path[-1] == _POSITION else leaf

    return jax.tree.map_with_path(placed, state)


def _logits(size: Size, config: lm.Config) -> jax.Array:
    return jnp.zeros((size.B, config.vocab), jnp.float32)


def _state(skeleton: lm.LM, batch: int) -> Any:
    return jax.eval_shape(lambda model: model.init_state(batch), skeleton)
