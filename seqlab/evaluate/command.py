"""`seqlab eval`: a model on tasks and on texts, as tables, as JSON, and in a file."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from seqlab.errors import ConfigError
from seqlab.evaluate import asked, report
from seqlab.evaluate.accuracy import require_ids, score
from seqlab.evaluate.harness import Answers
from seqlab.evaluate.harness import run as harnessed
from seqlab.evaluate.perplexity import Perplexity, perplexity
from seqlab.models import store
from seqlab.tasks import read_twice as twice
from seqlab.tasks import tasks
from seqlab.train.corpus import open_corpus
from seqlab.train.sources import Source, Text, Tokens


def evaluate(
    path: pathlib.Path,
    words: Sequence[str] = (),
    *,
    text: Sequence[str] = (),
    tokens: Sequence[str] = (),
    examples: int | None = None,
    seed: int = 0,
    batch: int = 32,
    window: int | None = None,
    read_twice: bool = False,
    harness: Sequence[str] = (),
    include: pathlib.Path | None = None,
    max_length: int | None = None,
    say: Callable[[str], object] = lambda doing: None,
) -> dict[str, Any]:
    """What the model at `path` scores, ready for JSON: rows of `tasks`, `texts` and `harness`.

    words       tasks as `asked.parse` reads them
    text        files or patterns of UTF-8, a document each; tokens: token shards
    examples    of every setting; 256, or what its protocol says, by default
    batch       examples, or documents, side by side
    window      cut texts into pieces of so many tokens, as training does
    read_twice  give every example its context and question twice
    harness     tasks of lm-eval-harness, which `include`, a folder of task files, adds to

    Raises a SeqlabError where the model lacks what is asked of it.
    """
    settings = asked.parse(words, examples, seed)
    sources: list[Source] = [*(Text((t,)) for t in text), *(Tokens(t) for t in tokens)]
    if not (settings or sources or harness):
        raise ConfigError(
            "There is nothing to evaluate: give --text, --tokens or --harness, or name a task: "
            f"{', '.join(tasks())}."
        )
    model = store.load(path, max_length=max_length)
    for setting in settings:
        require_ids(model, setting.config.vocab, setting.task)
    found: dict[str, Any] = {"model": str(path), "tasks": [], "texts": [], "harness": []}
    for setting in settings:
        say(f"{setting.task} {setting.label}")
        made = setting.config.examples(setting.examples, setting.seed)
        found["tasks"].append(_scored(model, setting, twice(made) if read_twice else made, batch))
    for source in sources:
        show = lambda share: say(f"{source.name}: {share:.0%}")
        corpus = open_corpus(source, store.load_tokenizer(path, model))
        measured = perplexity(model, corpus, batch=batch, window=window, on_progress=show)
        found["texts"].append(_measured(source.name, window, measured))
    if harness:
        say("lm-eval-harness")
        answers = Answers(model, store.load_tokenizer(path, model), batch)
        found["harness"] = harnessed(answers, harness, include, examples)
    return found


def run(
    path: pathlib.Path, words: Sequence[str], *, as_json: bool, out: pathlib.Path | None, **options
) -> None:
    """Evaluate, print tables (or JSON), and write JSON to the file `out`."""
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"The folder of --out {out} does not exist: create it.")
    with Console(stderr=True).status("loading") as status:
        found = evaluate(path, words, say=status.update, **options)
    written = json.dumps(found, indent=1)
    if as_json:
        print(written)
    else:
        report.show(found, Console())
    if out is not None:
        _write(out, written + "\n")


def _scored(model: Any, setting: asked.Setting, examples, batch: int) -> dict[str, Any]:
    reached = score(model, examples, batch)
    return {
        "task": setting.task,
        "label": setting.label,
        "fields": setting.fields,
        "examples": setting.examples,
        "accuracy": reached.mean,
        "exact": reached.exact,
    }


def _measured(name: str, window: int | None, measured: Perplexity) -> dict[str, Any]:
    return {
        "text": name,
        "window": window,
        "documents": measured.documents,
        "tokens": measured.tokens,
        "bytes": measured.bytes,
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "accuracy": measured.accuracy,
    }


def _write(path: pathlib.Path, content: str) -> None:
    try:
        path.write_text(content, "utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out {path} cannot be written ({error.strerror}): choose another file."
        ) from error
