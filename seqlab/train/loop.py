"""The training loop: start or resume, step, evaluate, save, and stop where it is asked to."""

import collections
import contextlib
import math
import pathlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from seqlab import heap, settings
from seqlab.errors import CheckpointError, ConfigError, NumericalError
from seqlab.models.lm import LM
from seqlab.models.parameters import bind, decays, parameters
from seqlab.models.tokenizer import Tokenizer, load_tokenizer
from seqlab.parallel import processes
from seqlab.parallel.mesh import use_mesh
from seqlab.train import folder as run_folder
from seqlab.train import state as states
from seqlab.train.checkpoint import Checkpoints
from seqlab.train.config import Config
from seqlab.train.data import Loader
from seqlab.train.held_out import held_out_batches
from seqlab.train.lock import RunLock
from seqlab.train.peers import over_all_devices, refuse_differences
from seqlab.train.progress import Progress
from seqlab.train.signals import StopRequest
from seqlab.train.sinks import Sinks, open_sinks
from seqlab.train.start import weights_of
from seqlab.train.step import make_evaluation, make_step
from seqlab.train.turns import TurnTraining
from seqlab.train.watchdog import LIMITS, Limits, Watchdog
from seqlab.train.work import Work


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended; `model` is `Work.model` with its numbers, so mostly an LM."""

    model: Any
    tokenizer: Tokenizer
    step: int
    finished: bool  # False where a signal ended it early; calling `train` again goes on
    trained: bool  # False where the folder already held the finished run


def train(
    config: Config,
    folder: str | pathlib.Path,
    *,
    work: Work | None = None,
    say: Callable[[str], object] = print,
    limits: Limits = LIMITS,
) -> Outcome:
    """Train in a run folder: start, go on from its newest good checkpoint, or see that it is done.

    `work` says what trains and towards what; by default all weights of the config's model do.

    With many processes (see `parallel.processes`) all call this alike, over one shared folder, and
    process 0 alone speaks; `limits` say when they give one another up.

    Raises ConfigError where the folder holds another run or a running one, CheckpointError where
    all its checkpoints are damaged, NumericalError after `max_bad_steps` bad steps in a row.
    """
    model = config.model.skeleton()
    work = work or Work(model)
    refuse_differences(config, work.record)
    config, folder = over_all_devices(config), pathlib.Path(folder)
    tokenizer = processes.alike(lambda: load_tokenizer(config.data.tokenizer))
    _check(config, model, tokenizer, work)
    m = config.mesh
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(use_mesh(m.data, m.seq, m.model, **m.travel._asdict()))
        processes.once(lambda: run_folder.check(folder, config, work.record))
        stack.enter_context(RunLock(folder))
        stop = stack.enter_context(StopRequest())
        with Watchdog(folder, limits) as watchdog:
            return _Run(config, folder, say, tokenizer, work, mesh, stack, watchdog).go(stop)


def _check(config: Config, model: LM, tokenizer: Tokenizer, work: Work) -> None:
    if tokenizer.vocab > config.model.vocab:
        raise ConfigError(
            f"The tokenizer {config.data.tokenizer!r} has {tokenizer.vocab} ids but the model "
            f"only {config.model.vocab}: set model.vocab={tokenizer.vocab}."
        )
    config.objective.check(model, config.data.length)
    if config.mesh.groups and work.trained is not None:
        raise ConfigError("mesh.groups trains whole models for the next token: leave it out here.")
    limit = model.max_length
    if limit is not None and config.data.length > limit:
        raise ConfigError(
            f"data.length = {config.data.length} is beyond max_length = {limit} of a mixer in "
            "model.pattern: shorten the one or lengthen the other."
        )


class _Run:
    def __init__(self, config, folder, say, tokenizer, work, mesh, stack, watchdog):
        self.watchdog, self.vote = watchdog, processes.Vote()
        self.config, self.folder = config, folder
        self.say = say if processes.first() else lambda text: None
        self.warn = lambda text: (self.say if processes.first() else say)(text)
        self.tokenizer, self.work, self.mesh, self.stack = tokenizer, work, mesh, stack
        shrinks = decays(work.model)
        self.optimizer = config.optimizer.build(config.steps, {n: shrinks[n] for n in work.names})
        self.frozen = work.placed(states.places(work.model, mesh))
        # all at once: a rate computed in the loop would wait for the step under way
        self.rates = np.asarray(
            config.optimizer.learning_rate(config.steps)(np.arange(config.steps))
        )
        self.checkpoints = self._closing(
            Checkpoints(
                folder / "checkpoints",
                keep=config.checkpoint.keep,
                on_failure=config.checkpoint.on_failure,
                on_warning=self.warn,
            )
        )
        self.step, self.tokens, self.position, self.fingerprint = 0, 0, None, None
        self.evaluated = False
        self.state = self._start_or_resume()

    def go(self, stop: StopRequest) -> Outcome:
        config, first = self.config, self.step
        if self.step >= config.steps:
            more = "." if self.work.name else ": to train further, give a larger steps=."
            self.say(f"{self.folder} is finished at step {self.step}{more}")
            return self._outcome(trained=False)
        if first:
            self.say(f"Going on in {self.folder} from step {first} of {config.steps}.")
        rows = states.rows_here(config.data.batch, self.mesh)
        self.loader = self._closing(
            Loader(
                config.data,
                self.tokenizer,
                start=self.position,
                fingerprint=self.fingerprint,
                rows=None if config.mesh.groups else rows,
            )
        )
        self.work.check(self.loader)
        self.held_out = held_out_batches(config.data, self.tokenizer, rows=rows)
        for note in (*self.loader.notes, *self.held_out.notes):
            self.say(note)
        self.sinks = self._closing(self._open_sinks())
        console = Console(highlight=False, quiet=not processes.first())
        self.progress = self._closing(Progress(config.steps, first, console, name=self.work.name))
        self.say = self.progress.note
        self.place, self.train_step = self._training()
        ask, work = config.objective.ask, self.work
        self.evaluate_batch = make_evaluation(work.model, ask, work.evaluation)
        self._steps(stop)
        if self.step >= config.steps:
            self._evaluate()
        self._save()
        self.checkpoints.wait()
        if not processes.once(lambda: self.step in self.checkpoints.steps()):
            raise CheckpointError(
                f"Step {self.step}, the last, is not saved in {self.folder}: free space and run "
                "the same command again."
            )
        if self.step < config.steps:
            name = signal.Signals(self.stopped).name
            self.say(f"{name}: saved at step {self.step}; run the same command to go on.")
        return self._outcome(trained=True)

    def _training(self) -> tuple[Callable, Callable]:
        """What puts a batch on devices, and the step that takes it."""
        if self.config.mesh.groups:
            turns = TurnTraining(self.work.model, self.optimizer, self.mesh, self.say)
            return turns.place, turns.step
        step = make_step(
            *(self.work.model, self.optimizer, self.config.accumulate),
            *(self.work.loss, self.config.objective.ask, self.config.seed),
        )
        place = lambda batch: states.place(batch, self.mesh)
        return place, lambda *carried: step(*carried, self.frozen)

    def _open_sinks(self) -> Sinks:
        """Of many processes the first alone writes."""
        if not processes.first():
            return Sinks(())
        run_folder.write(self.folder, self.config, self.work.record)
        return open_sinks(
            self.folder,
            start_step=self.step,
            tensorboard=self.config.track.tensorboard,
            wandb_project=self.config.track.wandb,
            config=run_folder.describe(self.config, self.work.record),
            warn=self.warn,
        )

    def _steps(self, stop: StopRequest) -> None:
        """Metrics are fetched one step late, so that the device never waits for the host."""
        pending, began, last, first = None, time.monotonic(), time.monotonic(), self.step
        while self.step < self.config.steps and not self._asked_to_stop(stop):
            asked = time.monotonic()
            compiling = self.step < first + 2  # metrics are fetched a step late
            self.watchdog.begins(self.step + 1, slow=compiling)
            batch = self.place(next(self.loader))
            waited = time.monotonic() - asked
            self.watchdog.at(f"in step {self.step + 1}", slow=compiling)
            params, optimizer, metrics = self.train_step(*self.state, batch)
            self.state = states.State(params, optimizer)
            self.step += 1
            if self.step == first + 1:
                heap.trim()  # of what compiling took
            self.checkpoints.poll()
            if pending is not None:
                last = self._record(*pending, last, began)
            pending = (self.step, metrics, waited)
            if self._due(self.config.checkpoint.every) or self._due(self.config.evaluate_every):
                last = self._record(*pending, last, began)
                pending = None
                if self._due(self.config.evaluate_every):
                    self._evaluate()
                if self._due(self.config.checkpoint.every):
                    self._save()
                last = time.monotonic()  # speeds leave out evaluating and saving
        if pending is not None:
            self._record(*pending, last, began)

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether any process got a signal: all of them learn it in the same step."""
        self.stopped = self.vote(stop.signal)
        return bool(self.stopped)

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0 and self.step < self.config.steps

    def _record(self, step, metrics, waited, last, began) -> float:
        """Log the row of a step that has ended; returns when that was."""
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        tokens, seconds = metrics.pop("tokens"), max(now - last, 1e-9)
        self.tokens += tokens
        bad, loss = metrics.pop("bad_steps"), metrics.pop("loss")
        bits = {"bits_per_byte": self._bits(loss, self.loader.bytes_per_token)}
        row = {
            "step": step,
            "loss": loss,
            **(bits if self.work.in_nats else {}),
            "lr": float(self.rates[step - 1]),
            **metrics,  # the norm of the gradient, and what layers add to the loss
            "tokens": self.tokens,
            "tokens_per_second": tokens / seconds,
            "data_wait": min(waited / seconds, 1.0),
            "seconds": now - began,
        }
        self._log(row)
        if bad:
            self.say(f"step {step}: the gradient is not finite; the update was skipped.")
        if bad >= self.config.max_bad_steps:
            raise NumericalError(
                f"The gradient was not finite for {bad} steps up to step {step}: start another run "
                "with a lower optimizer.lr or optimizer.clip; none of these steps was applied."
            )
        return now

    def _evaluate(self) -> None:
        if not len(self.held_out):
            return
        sums: dict[str, float] = collections.defaultdict(float)
        for batch in self.held_out:
            self.watchdog.at("evaluating", slow=not self.evaluated)
            self.evaluated = True
            batch = states.place(batch, self.mesh)
            total = self.evaluate_batch(self.state.params, batch, self.frozen)
            more = {"loss": total.nats, "tokens": total.tokens, **total.seen}
            for name, value in more.items():
                sums[name] += float(value)
        tokens = max(sums.pop("tokens"), 1)
        row = {f"held_out_{name}": value / tokens for name, value in sums.items()}
        bits = self._bits(row["held_out_loss"], self.held_out.bytes_per_token)
        self._log({"step": self.step, **row, "held_out_bits_per_byte": bits})

    def _log(self, row: dict) -> None:
        self.sinks.log(row["step"], row)
        self.progress.update(row)

    @staticmethod
    def _bits(nats_per_token: float, bytes_per_token: float) -> float:
        return nats_per_token / math.log(2) / bytes_per_token

    def _save(self) -> None:
        self.watchdog.at(f"saving step {self.step}", slow=True)
        self.sinks.sync()
        self.checkpoints.save(
            self.step,
            states.to_arrays(self.state),
            {
                "step": self.step,
                "tokens": self.tokens,
                "position": self.loader.position,
                "fingerprint": self.loader.fingerprint,
                "model": settings.plain(self.config.model),
            },
        )

    def _start_or_resume(self) -> states.State:
        work = self.work
        like = states.abstract(work.model, self.optimizer, self.mesh, work.trained)
        restored = self.checkpoints.latest(states.to_arrays(like))
        if restored is None:
            rows = processes.once(lambda: run_folder.set_rows_aside(self.folder))
            if rows:
                self.say(
                    f"{self.folder} holds no checkpoint: starting at step 1; the rows of the "
                    f"earlier run are in {rows}."
                )
            return self._start(like)
        self.step, self.tokens = restored.step, restored.metadata["tokens"]
        self.position = restored.metadata["position"]
        self.fingerprint = restored.metadata["fingerprint"]
        return states.from_arrays(restored.arrays, like)

    def _start(self, like: states.State) -> states.State:
        config, arrays = self.config, self.work.trained
        if config.start is not None and arrays is None:
            arrays = weights_of(config.start, parameters(self.work.model))
        if arrays is None:
            return states.start(config.model, config.seed, self.optimizer, like)
        return states.start_from(arrays, self.optimizer, like)

    def _outcome(self, *, trained: bool) -> Outcome:
        model = bind(self.work.model, {**self.frozen, **self.state.params})
        return Outcome(model, self.tokenizer, self.step, self.step >= self.config.steps, trained)

    def _closing(self, thing):
        return self.stack.enter_context(contextlib.closing(thing))
