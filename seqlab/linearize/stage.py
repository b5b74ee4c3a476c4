"""One stage of a recipe is one training run, resumable, in a folder of its own."""

import dataclasses
import gc
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from seqlab import heap, settings
from seqlab.errors import ConfigError, SeqlabError
from seqlab.linearize import lora, losses
from seqlab.linearize.recipes import Stage
from seqlab.linearize.swap import Pair
from seqlab.linearize.transfer import Models
from seqlab.models.decoder import places
from seqlab.models.lm import LM
from seqlab.models.parameters import bind, parameters
from seqlab.train.config import Config
from seqlab.train.data import Data
from seqlab.train.loop import train
from seqlab.train.work import Work


class Stopped(SeqlabError):
    """A signal ended a stage early: what there is is saved, and nothing went wrong."""

    code = 0


def run(
    pair: Pair,
    stage: Stage,
    data: Data,
    folder: pathlib.Path,
    *,
    say: Callable[[str], object] = print,
    **fields: Any,
) -> Pair:
    """The pair after a stage, whose run is in `folder`: begun, gone on with, or seen to be done.

    Rows are of the stage's length and batch, whatever `data` has; `fields` are others of
    `train.config.Config`, such as mesh, seed, accumulate or evaluate_every. The run's
    `held_out_loss` is the student's cross-entropy, and `held_out_layer` (and so on) what it trains
    for. Memory holds the teacher, which is never copied, what trains in float32, with its gradients
    and moments, and activations.

    The student's weights keep their dtypes and places; adapters are merged. Raises Stopped where a
    signal ended the run early, ConfigError, DataError, and what `train` raises.
    """
    config = run_config(pair, stage, data, **fields)
    student = adapted(pair.student, stage, config.seed)
    teacher = None if stage.loss == "ce" else pair.teacher
    names = trained(pair, student, stage)
    work = _work(Models(teacher, student), names, stage, folder.name)
    outcome = train(config, folder, work=work, say=say)
    gc.collect()  # of the run, which refers to itself: its moments and its program
    heap.trim()
    if not outcome.finished:
        raise Stopped(f"The stage in {folder} is not finished: run the same command to go on.")
    student = _with(student, parameters(outcome.model.student), names)
    return pair._replace(student=lora.merge(student) if stage.lora else student)


def run_config(pair: Pair, stage: Stage, data: Data, **fields: Any) -> Config:
    """The train run that a stage is; the pair may be without its numbers.

    Raises ConfigError where a model holds fewer tokens than a row has, and what `Config` does.
    """
    reads = {"teacher": pair.teacher, "student": pair.student}
    for who in reads if stage.loss != "ce" else ("student",):
        limit = reads[who].max_length
        if limit is not None and limit < stage.length:
            raise ConfigError(
                f"A stage has length={stage.length} and the {who} holds max_length = {limit} "
                f"tokens: give the stage length={limit} or less, or the teacher a longer "
                "--max-length."
            )
    return Config(
        model=pair.student.config,
        data=dataclasses.replace(data, length=stage.length, batch=stage.batch),
        steps=stage.steps,
        optimizer=stage.optimizer(),
        **fields,
    )


def trained(pair: Pair, student: LM, stage: Stage) -> list[str]:
    """The names of what a stage trains, of the pair's student or of that with adapters."""
    if stage.train == "lora":
        chosen = lora.adapters(student)
    elif stage.train == "extra":
        chosen = pair.extra
    else:
        layers = places(student.config)
        inside = {f"{layers[n][0]}mixer." for n in pair.replaced}
        chosen = {
            name
            for name in parameters(student)
            if stage.train == "all" or name.startswith(tuple(inside))
        }
    if not chosen:
        raise ConfigError(
            f"train={stage.train!r} trains nothing here: this mixer has no weights that attention "
            "had not; train 'lora', 'mixer' or 'all'."
        )
    return [name for name in parameters(student) if name in chosen]


def adapted(student: LM, stage: Stage, seed: int = 0) -> LM:
    """The student with the adapters that a stage trains, if it does."""
    if stage.lora is None:
        return student
    low = stage.lora
    names = [path for name in low.on for path in _maps(student, name) or [name]]
    return lora.wrap(student, names, low.rank, low.alpha, rngs=nnx.Rngs(seed))


def _maps(student: LM, role: str) -> list[str]:
    """The maps of all mixers that are called so, or have the part of attention's that is."""
    found = []
    for at in ("before", "blocks", "after"):
        for i, block in enumerate(getattr(student, at)):
            parts = {name: dict(of) for name, of in getattr(block.mixer, "projections", {}).items()}
            names = [name for name, roles in parts.items() if role in roles]
            names += [role] if hasattr(block.mixer, role) and role not in names else []
            found += [f"{at}.{i}.mixer.{name}" for name in names]
    return found


def _work(models: Models, names: list[str], stage: Stage, name: str) -> Work:
    arrays = parameters(models)
    mine = {f"student.{name}" for name in names}
    loss = losses.of(stage.loss, stage.w_kl, stage.w_ce)
    return Work(
        model=jax.eval_shape(lambda models: models, models),
        trained={name: a for name, a in arrays.items() if name in mine},
        frozen={name: a for name, a in arrays.items() if name not in mine},
        loss=loss,
        evaluation=losses.measured(stage.loss, loss),
        in_nats=stage.loss == "ce",
        name=name,
        record={"stage": settings.plain(stage)},
        check=lambda loader: stage.require(loader.tokens, name),
    )


def _with(student: LM, after: dict[str, jax.Array], names: list[str]) -> LM:
    """The student with these weights of others, in the dtypes and places of its own."""
    params = parameters(student)
    for name in names:
        old = params[name]
        params[name] = jax.device_put(after[name].astype(old.dtype), old.sharding)
    return bind(student, params)
