"""`seqlab bench train`: a step of training, of models of one size."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.bench import machine, models
from seqlab.bench.ceilings import Ceilings
from seqlab.bench.contestants import gather
from seqlab.bench.models import SOFTMAX, Entry
from seqlab.bench.record import Row
from seqlab.bench.timing import Laps, Work, figure, race, ratio, spread
from seqlab.models.lm import LM
from seqlab.models.parameters import bind, decays, parameters
from seqlab.models.summary import parameter_count
from seqlab.plan.estimate import PASSES
from seqlab.plan.flops import products
from seqlab.train import optimizer
from seqlab.train.corpus import Batch
from seqlab.train.step import loss, make_step


class Step(NamedTuple):
    """A step with clipping and AdamW; `bytes` its program holds beside parameters and batch."""

    work: Work
    bytes: int
    parameters: int
    flops: int


def step(model: LM, tokens: np.ndarray) -> Step:
    """Of tokens [B, T + 1]; raises ConfigError where there is no memory for it."""
    batch = Batch(tokens, np.ones_like(tokens))
    skeleton = jax.eval_shape(lambda: model)
    tx = optimizer.Config().build(1000, decays(model))
    params = jax.tree.map(jnp.array, parameters(model))
    held: list[Any] = [params, tx.init(params)]
    program = make_step(skeleton, tx).lower(*held, batch).compile()
    machine.require(program)

    def work() -> object:
        *held[:], metrics = program(*held, batch)
        return jax.block_until_ready(metrics)

    nats = lambda params: loss(bind(skeleton, params), batch).nats
    flops = PASSES * products(nats, parameters(skeleton))
    return Step(
        work, program.memory_analysis().temp_size_in_bytes, parameter_count(skeleton), flops
    )


def measure(
    entries: Sequence[Entry], rows: int, length: int, rounds: int, top: Ceilings
) -> list[Row]:
    """A row for each model: tokens a second, against softmax attention and against products."""
    make = lambda config: step(models.built(config), models.text((rows, length + 1), config.vocab))
    about = lambda name: {"model": name, "size": f"B{rows} T{length}", "B": rows, "T": length}
    makers = {entry.label: functools.partial(make, entry.config) for entry in entries}
    made, absent = gather(makers, about)
    laps = race(top.works | {name: one.work for name, one in made.items()}, rounds)
    tokens = rows * length
    return [about(name) | _row(name, one, tokens, laps, top) for name, one in made.items()] + absent


def _row(name: str, one: Step, tokens: int, laps: dict[str, Laps], top: Ceilings) -> Row:
    seconds = laps[name].seconds
    row = {"parameters": one.parameters, **figure("tokens/s", spread(tokens / seconds))}
    if SOFTMAX in laps:
        row |= figure("against softmax", ratio(laps[SOFTMAX].seconds, seconds))
    row |= {"bytes of a step": one.bytes, "operations": one.flops}
    row |= figure("of the product", top.of_product(one.flops, laps, name))
    return row | top.row(laps)
