"""A linearization from the teacher's folder to the student's: load, swap, train, save. Each step is
measured, and one that is done is not done again."""

import pathlib
from collections.abc import Callable
from typing import Any

from flax import nnx

from seqlab.errors import ConfigError, DataError
from seqlab.linearize import report, room, sources, stage, targets
from seqlab.linearize.estimate import Estimate, estimate
from seqlab.linearize.measure import Judge, batch_size
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recall import recall
from seqlab.linearize.record import BASELINE, SWAP, TEACHER, Figures, Record
from seqlab.linearize.request import Request
from seqlab.linearize.swap import Pair, Plan, plan, swap
from seqlab.models import export, layout, lm, store
from seqlab.models.lm import LM
from seqlab.parallel.mesh import use_mesh
from seqlab.train.corpus import open_corpus
from seqlab.train.data import Data
from seqlab.train.held_out import held_out_batches
from seqlab.train.lock import RunLock

WINDOW, SINKS = 64, 4  # of the baseline, where the method has no window of its own
EVALUATIONS = 20  # of a stage, for its curve
FILLER = 2**16  # tokens of the held-out text that recall takes stretches of
LENGTH = 2048  # tokens of a row in evaluations, where no stage has longer ones

Say = Callable[[str], object]


def linearize(
    request: Request, out: pathlib.Path, *, to: pathlib.Path | None = None, say: Say = print
) -> Record:
    """Make all of a linearization that its folder lacks, and export the student to the folder `to`.

    The folder holds linearize.json, report.html with its pictures, a run folder for each stage in
    stages/ and, once it is finished, the student in model/, as `store.save` writes it. Whatever
    ends this early, the same call goes on.

    Raises a SeqlabError for bad input, before anything is trained, and what `train` raises.
    """
    record, m = Record(out, request), request.mesh  # a folder that is not ours is left alone
    if to is not None and to.exists() and not record.finished:
        raise ConfigError(f"--export {to} exists: choose another folder.")
    with RunLock(out), use_mesh(m.data, m.seq, m.model, **m.travel._asdict()) as mesh:
        record = Record(out, request)
        if record.finished:
            say(f"{out} is finished.")
        else:
            _Run(request, record, mesh, say).go(to)
        if to is not None and not to.exists():
            own = store.tokenizer_of(out)
            tokenizer = own if isinstance(own, pathlib.Path) else None
            export.export_hf(store.load(out), to, tokenizer=tokenizer)
            say(f"{to} is the student as a published model.")
    return record


def planned(request: Request) -> Plan:
    """What the swap of a request would change; raises what `swap.plan` does."""
    config = store.load_config(request.teacher, max_length=request.max_length)
    return plan(config, **_arguments(request, config))


def estimated(request: Request) -> Estimate:
    """What a request comes to; no weight is read."""
    return estimate(planned(request), request.stages, pathlib.Path(request.teacher))


class _Run:
    """What is done inside the folder's lock and the mesh."""

    def __init__(self, request: Request, record: Record, mesh: Any, say: Say):
        self.request, self.record, self.mesh, self.say = request, record, mesh, say
        self.tokenizer = store.load_tokenizer(request.teacher)

    def go(self, to: pathlib.Path | None) -> None:
        r, out = self.request, self.record.folder
        self._check(to)
        lying = lambda config: plan(config, **_arguments(r, config)).teacher  # as the swap needs it
        teacher = store.load(r.teacher, max_length=r.max_length, layout=lying)
        pair = swap(teacher, **_arguments(r, teacher.config), rngs=nnx.Rngs(r.seed))
        data = _data(r, pair.teacher)
        judge = Judge(held_out_batches(data, self.tokenizer), self.mesh, self._recall)
        self._figures(TEACHER, lambda: judge.teacher(pair.teacher))
        self._figures(SWAP, lambda: judge.student(pair))
        self._figures(BASELINE, lambda: judge.student(baseline(pair)))
        tokens = 0
        for name, wanted in r.runs.items():
            pair = stage.run(
                *(pair, wanted, data, out / "stages" / name),
                say=self.say,
                mesh=r.mesh,
                seed=r.seed,
                evaluate_every=max(1, wanted.steps // EVALUATIONS),
            )
            tokens += wanted.tokens
            self._figures(name, lambda pair=pair, tokens=tokens: judge.student(pair, tokens))
        store.save(pair.student, out / store.INNER, tokenizer=store.tokenizer_of(r.teacher))
        self.record.finished = True
        self.record.write()

    def _check(self, to: pathlib.Path | None) -> None:
        """Refuse what would come to grief later, before weights are read."""
        r, record = self.request, self.record
        record.estimate = found = estimated(r)
        held = sources.tokens(r.train, self.tokenizer)
        for name, wanted in r.runs.items():
            wanted.require(held, name)
        exported = {to: found.student_bytes} if to is not None else {}
        room.require({record.folder: found.disk_bytes, **exported})
        record.write()

    def _recall(self, model: LM) -> dict[int, float | None]:
        """Asked amid the beginning of the held-out text; nothing where that is too short for it."""
        corpus = open_corpus(self.request.held_out[0], self.tokenizer)
        filler = corpus.read([(0, min(corpus.tokens, FILLER))])[0]
        try:
            return recall(model, self.tokenizer, filler[filler != self.tokenizer.stop], say=_silent)
        except DataError:
            return {}

    def _figures(self, name: str, measure: Callable[[], Figures]) -> None:
        """Measure, unless that was done before, and say what came out."""
        fresh = name not in self.record.figures
        self.record.figure(name, measure)
        if fresh:
            self.say(report.sentence(self.record, name))
        if fresh and BASELINE in self.record.figures:
            self._report()

    def _report(self) -> None:
        try:
            report.write(self.record)
        except Exception as error:  # the work is whole; its page is written again with the next
            self.say(f"The report could not be written ({type(error).__name__}: {error}).")


def _silent(text: str) -> None:
    """Distances that a model cannot hold are seen in the table."""


def baseline(pair: Pair) -> Pair:
    """The teacher with a window and the first tokens in the place of whatever the student has:
    nothing of it is trained, and it keeps as many keys as the student's window."""
    blocks = layout.layers(pair.student.config)
    window = getattr(blocks[pair.replaced[0]].mixer, "window", None) or WINDOW
    target = lambda attention: PRESETS["swa_sink"](attention, window=max(window - SINKS, 1))
    keep = set(range(len(blocks))) - set(pair.replaced)
    return swap(pair.teacher, target, keep=keep, rngs=nnx.Rngs(0))


def _arguments(r: Request, config: lm.Config) -> dict[str, Any]:
    """Of `plan` and `swap`, for a teacher of this config."""
    keep = r.kept(len(layout.layers(config)))
    return {"target": targets.target(r.mixer, r.fields, config.d_model), "keep": keep}


def _data(r: Request, teacher: LM) -> Data:
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
