"""A linearization from the teacher's folder to the student's: load, swap, train, save. Each step is
measured, and one that is done is not done again."""

import pathlib
from collections.abc import Callable
from typing import Any

from flax import nnx

from seqlab.errors import DataError
from seqlab.linearize import report, room, stage
from seqlab.linearize.checks import arguments, checked, data_of
from seqlab.linearize.measure import Judge
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.recall import recall
from seqlab.linearize.record import BASELINE, SWAP, TEACHER, Figures, Record
from seqlab.linearize.request import Request
from seqlab.linearize.swap import Pair, Target, plan, swap
from seqlab.models import convert, layout, store
from seqlab.models.lm import LM
from seqlab.parallel.mesh import use_mesh
from seqlab.train.corpus import open_corpus
from seqlab.train.held_out import held_out_batches
from seqlab.train.lock import RunLock

WINDOW, SINKS = 64, 4  # of the baseline, where the method has no window of its own
EVALUATIONS = 20  # of a stage, for its curve
FILLER = 2**16  # tokens of the held-out text that recall takes stretches of

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
    m, found = request.mesh, None
    if not Record(out, request).finished:  # what is refused leaves no folder behind
        found = checked(request, to)
        exported = {to: found.student_bytes} if to is not None else {}
        room.require({out: found.disk_bytes, **exported})
    with RunLock(out), use_mesh(m.data, m.seq, m.model, **m.travel._asdict()) as mesh:
        record = Record(out, request)
        if record.finished:
            say(f"{out} is finished.")
        else:
            record.estimate = found
            if record.figures:
                say(f"Going on in {out} after {report.label(list(record.figures)[-1])}.")
            _Run(request, record, mesh, say).go()
        if to is not None:
            say(f"{to} is there already." if to.exists() else convert.convert(out, to))
    return record


class _Run:
    """What is done inside the folder's lock and the mesh."""

    def __init__(self, request: Request, record: Record, mesh: Any, say: Say):
        self.request, self.record, self.mesh, self.say = request, record, mesh, say
        self.tokenizer = store.load_tokenizer(request.teacher)

    def go(self) -> None:
        r, out = self.request, self.record.folder
        self.record.write()
        pair = self._swapped()
        data = data_of(r, pair.teacher)
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
            tokens += wanted.predicted
            self._figures(name, lambda pair=pair, tokens=tokens: judge.student(pair, tokens))
        store.save(
            pair.student, out / store.INNER, tokenizer=store.tokenizer_of(pathlib.Path(r.teacher))
        )
        self.record.finished = True
        self.record.write()

    def _swapped(self) -> Pair:
        r = self.request
        lying = lambda config: plan(config, **arguments(r, config)).teacher  # as the swap needs it
        teacher = store.load(r.teacher, max_length=r.max_length, layout=lying)
        return swap(teacher, **arguments(r, teacher.config), rngs=nnx.Rngs(r.seed))

    def _recall(self, model: LM) -> dict[int, float | None]:
        """Asked amid the beginning of the held-out text; nothing where that is too short for it."""
        corpus = open_corpus(self.request.held_out[0], self.tokenizer)
        ids = corpus.read([(0, min(corpus.tokens, FILLER))])[0]
        filler = ids[ids != self.tokenizer.stop].tolist()
        try:
            return recall(model, self.tokenizer, filler, say=_silent)
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
    """The teacher with a window and sinks in the place of whatever the student has; nothing of it
    is trained."""
    blocks = layout.layers(pair.student.config)
    target = window_and_sinks(blocks[pair.replaced[0]].mixer)
    keep = set(range(len(blocks))) - set(pair.replaced)
    return swap(pair.teacher, target, keep=keep, rngs=nnx.Rngs(0))


def window_and_sinks(mixer: Any) -> Target:
    """Attention that sees as many keys as a mixer's window has, the first tokens among them."""
    window, sinks = getattr(mixer, "window", None), getattr(mixer, "sinks", 0)
    own = max((window or WINDOW) + sinks - SINKS, 1)
    return lambda attention: PRESETS["swa_sink"](attention, window=own)
