"""lm-eval-harness (the extra `eval`) over models of seqlab: the three requests it makes of a model.

Texts become ids, contexts are cut, and continuations are scored as its own path over transformers
does it, so that figures compare. What has no limit here is never cut.
"""

import importlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from seqlab import settings
from seqlab.errors import ConfigError
from seqlab.evaluate.reading import Reader, chunks
from seqlab.infer.sample import Sampling
from seqlab.infer.session import Session
from seqlab.models.published_tokenizer import PublishedTokenizer
from seqlab.models.tokenizer import Tokenizer

MOST_TOKENS = 256  # of a generation, where a request sets no limit
SAMPLED = ("temperature", "top_k", "top_p", "min_p")


class Answers:
    """What a model answers to the requests of the harness, in their order; greedy unless asked.

    batch: rows at once.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, batch: int = 8):
        self._model, self._tokenizer, self._batch = model, tokenizer, batch
        self._reader = Reader(model)
        first = tokenizer.start or (() if tokenizer.stop is None else (tokenizer.stop,))
        if not first:
            raise ConfigError(
                "The tokenizer has no mark to begin a text with: give one with a start or an end "
                "token."
            )
        self._prefix = first[0]

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(context, continuation) -> its log-probability, and whether it is the likeliest one."""
        return self._scored([self._pair(*request) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """The log-probability of each text, from its first token on.

        A model with a `max_length` reads it in windows of that, of which only the last looks back.
        """
        rows = [list(self._windows(text)) for (text,) in requests]
        scores = iter(self._scored([row for windows in rows for row in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in rows]

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """(context, options) -> the continuation up to the first string of its `until`."""
        answers = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for i, (_, options) in enumerate(requests):
            by_options.setdefault(repr(options), []).append(i)
        for alike in by_options.values():
            for part in _parts(alike, self._batch):
                texts = self._generated([requests[i][0] for i in part], requests[part[0]][1])
                for i, text in zip(part, texts, strict=True):
                    answers[i] = text
        return answers

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The ids of both, and how many of them are the continuation's."""
        if not context:
            ids = self._tokenizer.encode(continuation)
            ids = ids if ids[:1] == [self._prefix] else [self._prefix, *ids]
            return ids, len(ids) - 1
        spaces = len(context) - len(context.rstrip())  # belong to the word that follows
        start = self._tokenizer.prompt(context[: len(context) - spaces])
        whole = self._tokenizer.prompt(context + continuation)
        return [*start, *whole[len(start) :]], len(whole) - len(start)

    def _windows(self, text: str) -> Iterator[tuple[list[int], int]]:
        """Windows of a text and how many of the last ids of each are scored in it.

        Where a published tokenizer begins texts with a mark, the harness scores that too.
        """
        published = isinstance(self._tokenizer, PublishedTokenizer)
        read = self._tokenizer.prompt if published else self._tokenizer.encode
        ids = [self._prefix, *read(text)]
        size = self._model.max_length or len(ids)
        for start in range(0, len(ids) - 1, size):
            end = min(start + size, len(ids) - 1)
            yield ids[max(0, end - size) : end + 1], end - start

    def _scored(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of each row of ids, the log-probability of the last so many of them."""
        self._reader.require_no_prefix()
        limit = self._model.max_length
        rows = [(ids if limit is None else ids[-limit - 1 :], count) for ids, count in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for part in _parts(order, self._batch):
            for i, score in zip(part, self._read([rows[i] for i in part]), strict=True):
                scores[i] = score
        return scores

    def _read(self, rows: list[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        length = max(1, max(len(ids) for ids, _ in rows) - 1)
        tokens = np.zeros((self._batch, length), np.int32)
        targets = np.full_like(tokens, -1)
        for row, (ids, count) in enumerate(rows):
            last = len(ids) - 1
            tokens[row, :last] = ids[:-1]
            targets[row, last - count : last] = ids[last + 1 - count :]
        size = self._reader.chunk_size(self._batch, length)
        nats, met = np.zeros(self._batch), np.ones(self._batch, bool)
        for chunk, said in self._reader.read(chunks(tokens, targets, size)):
            asked = chunk.targets >= 0
            nats += np.where(asked, said.nats, 0.0).sum(1, dtype=np.float64)
            met &= (~asked | (said.likeliest == chunk.targets)).all(1)
        yield from zip((-nats[: len(rows)]).tolist(), met[: len(rows)].tolist(), strict=True)

    def _generated(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        steps, until, sampling = _options(options)
        limit = self._model.max_length
        if limit is not None and steps >= limit:
            raise ConfigError(
                f"A request for {steps} tokens leaves no room for its context in the model's "
                f"max_length of {limit}: lower max_gen_toks."
            )
        rows = [self._tokenizer.prompt(context) or [self._prefix] for context in contexts]
        if limit is not None:
            rows = [row[steps - limit :] for row in rows]
        rows += rows[-1:] * (self._batch - len(rows))  # one program for all batches
        session = Session(self._model)
        session.feed([np.array(row, np.int32) for row in rows])
        ids: list[list[int]] = [[] for _ in rows]
        texts = [""] * len(rows)
        for block in session.generate(steps, sampling, stop=self._tokenizer.stops or None):
            for row, (tokens, count) in enumerate(zip(block.tokens, block.counts, strict=True)):
                ids[row] += tokens[:count].tolist()
                texts[row] = self._tokenizer.decode(ids[row])
            if all(any(stop in text for stop in until) for text in texts):
                break
        return [_cut(text, until) for text in texts[: len(contexts)]]


def _options(options: dict[str, Any]) -> tuple[int, list[str], Sampling]:
    """The most tokens, the strings that end them, and how they are drawn."""
    until = options.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    steps = next((options[name] for name in names if options.get(name) is not None), MOST_TOKENS)
    drawn = {name: options[name] for name in SAMPLED if options.get(name) is not None}
    sampled = options.get("do_sample", drawn.get("temperature", 0.0) > 0)
    drawn = {"temperature": 1.0} | drawn if sampled else {}
    return (
        int(steps),
        [until] if isinstance(until, str) else [text for text in until if text],
        settings.read(Sampling, drawn, where="the request"),
    )


def _cut(text: str, until: Iterable[str]) -> str:
    for stop in until:
        text = text.partition(stop)[0]
    return text


def _parts(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for i in range(0, len(indices), size):
        yield indices[i : i + size]


def adapter(answers: Answers) -> Any:
    """`answers` as a model that lm_eval takes; raises ConfigError where it is not installed."""
    LM = _lm_eval().api.model.LM

    class Adapter(LM):
        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
            return answers.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
            return answers.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
            return answers.generate_until([request.args for request in requests])

    return Adapter()


def run(
    answers: Answers,
    tasks: Sequence[str],
    include: pathlib.Path | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The figures of tasks of the harness; `include` is a folder with task files of one's own, and
    `limit` the number of examples of each. Raises ConfigError for a task it does not know."""
    lm_eval = _lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=include and str(include))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"lm-eval knows no task {unknown[0]!r}: lm-eval ls tasks lists them.")
    found = lm_eval.simple_evaluate(
        model=adapter(answers), tasks=list(tasks), task_manager=manager, limit=limit
    )
    return [row for task, figures in found["results"].items() for row in _figures(task, figures)]


def _figures(task: str, figures: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in figures.items():
        metric, comma, of = name.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = figures.get(f"{metric}_stderr,{of}")
        error = error if isinstance(error, float) else None
        yield {"task": task, "metric": metric, "filter": of, "value": float(value), "error": error}


def _lm_eval() -> Any:
    try:
        for name in ("lm_eval.api.model", "lm_eval.tasks"):
            importlib.import_module(name)
        return importlib.import_module("lm_eval")
    except ImportError:
        raise ConfigError("--harness needs lm-eval-harness: pip install 'seqlab[eval]'.") from None
