"""What would come to grief later is refused at once: before weights are read, before anything
trains, and with nothing written."""

import pathlib
from typing import Any

from seqlab.errors import ModelError
from seqlab.linearize import sources, stage, targets
from seqlab.linearize.estimate import Estimate, estimate
from seqlab.linearize.measure import batch_size
from seqlab.linearize.request import Request
from seqlab.linearize.swap import Pair, Plan, plan
from seqlab.models import export, layout, lm, store
from seqlab.models.lm import LM
from seqlab.train.data import Data

LENGTH = 2048  # tokens of a row in evaluations, where no stage has longer ones


def checked(request: Request, to: pathlib.Path | None = None) -> Estimate:
    """What a request comes to, whose student is to be exported to the folder `to`.

    Raises a SeqlabError where the teacher cannot be read, is of a family without a reader, or has
    another tokenizer; for what `swap.plan` refuses; where the data is too short for a stage, or
    rows are longer than a model holds; and where the student cannot be exported.
    """
    r, made = request, planned(request)
    pair = Pair(made.teacher.skeleton(), made.student.skeleton(), made.replaced, made.extra)
    tokenizer, data = store.load_tokenizer(r.teacher, pair.teacher), data_of(r, pair.teacher)
    held = sources.tokens(r.train, tokenizer)
    sources.tokens(r.held_out, tokenizer)
    for name, one in r.runs.items():
        one.require(held, name)
        stage.run_config(pair, one, data, mesh=r.mesh)
    if to is not None and to.exists():
        raise ModelError(f"--export {to} exists: choose another folder.")
    if to is not None and export.fields_of(made.student) is None:
        raise ModelError(
            "No published family can express the student, so it cannot be exported: leave --export."
        )
    return estimate(made, r.stages, pathlib.Path(r.teacher))


def planned(r: Request) -> Plan:
    """What the swap of a request changes."""
    config = store.load_config(r.teacher, max_length=r.max_length)
    return plan(config, **arguments(r, config))


def arguments(r: Request, config: lm.Config) -> dict[str, Any]:
    """Those of `plan` and `swap`, for a teacher of this config."""
    target = targets.target(r.mixer, r.fields, config.d_model)
    return {"target": target, "keep": r.kept(len(layout.layers(config)))}


def data_of(r: Request, teacher: LM) -> Data:
    """What stages read, and evaluations in rows of one length."""
    longest = max((stage.length for stage in r.stages), default=LENGTH)
    length = min(r.length or longest, teacher.max_length or longest)
    return Data(
        train=r.train,
        held_out=r.held_out,
        tokenizer=str(store.tokenizer_of(pathlib.Path(r.teacher))),
        length=length,
        batch=batch_size(teacher.config.vocab, length, r.mesh.data),
        seed=r.seed,
        held_out_rows=r.held_out_rows,
    )
