"""One model trained and tested under a protocol, compiled once for all its rates and seeds."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from seqlab.compare.budget import Budget
from seqlab.compare.entries import Entry
from seqlab.compare.results import Run
from seqlab.models.lm import LM
from seqlab.models.parameters import bind, decays, parameters
from seqlab.tasks import IGNORE, Accuracy, Examples, Protocol, accuracy
from seqlab.train.optimizer import Config as Optimizer
from seqlab.train.step import Loss, make_step

REPORTS = 50  # of the loss, in a run
TESTS = 4  # of the first test, in a run
TIMED = 5  # steps that are timed for a budget of seconds

#: say(step, of how many, loss, accuracy on the first test where it was just taken)
Say = Callable[[int, int, float, float | None], None]


class Diverged(Exception):
    """The loss of this step, the only argument, was not a finite number."""


class Trial:
    """Train an entry and test it; `run` may be called for many rates and seeds."""

    def __init__(self, entry: Entry, protocol: Protocol, budget: Budget):
        self.protocol, self.budget = protocol, budget
        self.skeleton = entry.model.skeleton()
        build = lambda key: parameters(entry.model.build(rngs=nnx.Rngs(key)))
        self._start = jax.jit(build)
        self._read = jax.jit(functools.partial(_read, self.skeleton))
        empty = lambda params: bind(self.skeleton, params).init_state(protocol.batch)
        self._empty = jax.jit(empty)
        self._tests = protocol.testing()

    def run(self, lr: float, seed: int, say: Say) -> Run:
        """Same arguments, same data, same order, same numbers, unless the budget is seconds."""
        began = time.perf_counter(), time.process_time()
        loss = diverged = None
        tests: dict[str, Accuracy] = {}
        try:
            params, loss = self._trained(lr, seed, say)
            tests = {label: self._tested(params, examples) for label, examples in self._tests}
        except Diverged as at:
            diverged = at.args[0]
        seconds = time.perf_counter() - began[0], time.process_time() - began[1]
        return Run(lr, seed, self.steps, *seconds, loss, tests, diverged)

    @functools.cached_property
    def steps(self) -> int:
        lengths, counts = zip(*((c.length, count) for c, count in self.protocol.train), strict=True)
        tokens = self.protocol.batch * float(np.average(lengths, weights=counts))
        seconds = self._seconds() if self.budget.unit == "seconds" else math.nan
        return self.budget.steps(tokens, seconds)

    @functools.cached_property
    def _program(self) -> tuple:
        return self._planned(self.steps)

    def _trained(self, lr: float, seed: int, say: Say) -> tuple[dict, float]:
        """The weights after all steps, and the last loss that was looked at."""
        steps, loss = self.steps, math.nan
        optimizer, step = self._program
        params = self._start(jax.random.key(seed))
        state = _at_rate(optimizer.init(params), lr)
        parts = self.protocol.training(seed)
        feed = itertools.islice(batches(parts, self.protocol.batch, seed), steps)
        for done, batch in enumerate(feed, 1):
            params, state, metrics = step(params, state, batch)
            if done % max(1, steps // REPORTS) == 0 or done == steps:
                loss = float(metrics["loss"])
                if not math.isfinite(loss):
                    raise Diverged(done)
                tested = done % max(1, steps // TESTS) == 0 and done < steps
                say(done, steps, loss, self._tested(params).mean if tested else None)
        return params, loss

    def _planned(self, steps: int) -> tuple:
        """An optimizer whose rate is a part of its state, and a step by it."""
        p = self.protocol
        falling = Optimizer(
            lr=1.0,
            warmup=p.warmup,
            final=p.final_lr,
            betas=(0.9, 0.999),
            weight_decay=p.weight_decay,
        ).build(steps, decays(self.skeleton))
        optimizer = optax.chain(falling, optax.inject_hyperparams(optax.scale)(step_size=1.0))
        return optimizer, make_step(self.skeleton, optimizer, loss=labelled)

    def _seconds(self) -> float:
        """What a step takes once it is compiled."""
        optimizer, step = self._planned(TIMED)
        params = self._start(jax.random.key(0))
        state = _at_rate(optimizer.init(params), 0.0)
        feed = batches(self.protocol.training(), self.protocol.batch, 0)
        params, state, _ = jax.block_until_ready(step(params, state, next(feed)))
        began = time.perf_counter()
        for batch in itertools.islice(feed, TIMED):
            params, state, _ = jax.block_until_ready(step(params, state, batch))
        return (time.perf_counter() - began) / TIMED

    def _tested(self, params: dict, examples: Examples | None = None) -> Accuracy:
        """The accuracy on examples, by default those of the first test."""
        inputs, labels = examples or self._tests[0][1]
        rows = self.protocol.batch
        whole = np.resize(inputs, (-(-len(inputs) // rows) * rows, inputs.shape[1]))
        read = [self._predicted(params, part) for part in np.split(whole, len(whole) // rows)]
        return accuracy(np.concatenate(read)[: len(inputs)], labels)

    def _predicted(self, params: dict, inputs: np.ndarray) -> np.ndarray:
        """[rows, L] -> [rows, L], in pieces, so that one program reads tests of every length."""
        piece = min(task.length for task, _ in self.protocol.train)
        state, read = self._empty(params), []
        for start in range(0, inputs.shape[1], piece):
            predictions, state = self._read(params, inputs[:, start : start + piece], state)
            read.append(np.asarray(predictions))
        return np.concatenate(read, 1)


def labelled(model: LM, batch: Examples) -> Loss:
    """Cross-entropy of the labels at their own positions."""
    logits, _ = model(jnp.asarray(batch.inputs))
    asked = batch.labels != IGNORE
    labels = jnp.where(asked, batch.labels, 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Loss(jnp.sum(jnp.where(asked, nats, 0.0)), jnp.sum(asked))


def batches(parts: Sequence[Examples], size: int, seed: int) -> Iterator[Examples]:
    """Batches without end: each epoch all of every part in a new order, in batches of one part.

    Of a part no more than what is left over from whole batches is left out; one that is smaller
    than a batch is repeated in it.
    """
    rng = np.random.default_rng(seed)
    while True:
        cut = [(part, rows) for part in parts for rows in _rows(rng, len(part.inputs), size)]
        for at in rng.permutation(len(cut)):
            part, rows = cut[at]
            yield Examples(part.inputs[rows], part.labels[rows])


def _rows(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return np.resize(rng.permutation(count), (max(count // size, 1), size))


def _read(skeleton: LM, params: dict, tokens: jax.Array, state: Any):
    logits, state = bind(skeleton, params)(tokens, state)
    return jnp.argmax(logits, -1), state


def _at_rate(state: Any, lr: float) -> Any:
    return optax.tree.set(state, step_size=jnp.asarray(lr, jnp.float32))
