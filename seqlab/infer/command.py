"""`seqlab generate`: text in, text out as it comes; states saved and taken up again."""

import itertools
import json
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from seqlab import settings
from seqlab.errors import ConfigError, DataError, ModelError
from seqlab.infer import text
from seqlab.infer.sample import Sampling
from seqlab.infer.session import Block, Session
from seqlab.infer.terminal import Terminal
from seqlab.models import store
from seqlab.models.published_tokenizer import PublishedTokenizer
from seqlab.models.tokenizer import ByteTokenizer, Tokenizer

PACE = 0.1  # seconds between two pieces of text on the screen


def generate(
    model: pathlib.Path,
    *,
    prompt: str | None = None,
    prompt_file: str | None = None,
    steps: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    batch: int = 1,
    stop: str | None = None,
    save_state: pathlib.Path | None = None,
    state: pathlib.Path | None = None,
    as_json: bool = False,
    chat: bool = False,
    system: str | None = None,
    read_twice: bool = False,
    max_length: int | None = None,
) -> int:
    """Run the command; returns the exit status: 0, or 130 after Ctrl-C.

    prompt_file  a UTF-8 file, or "-" for standard input; read in constant memory with byte tokens
    batch        so many continuations of the one prompt, drawn independently; above 1 they are
                 printed when all have ended, each under a header
    stop         a string that ends a row; neither it nor what follows is printed
    save_state   where the session is saved at the end, after Ctrl-C too: it stands right behind the
                 last token of the text (a stop string included)
    state        a file that `save_state` wrote: the prompt, which may then be absent, continues it
    chat         the prompt is a message in the model's chat template, after `system` if given
    read_twice   the prompt, or message, comes twice, or as often as fills the model's prefix
    max_length   tokens that full attention holds, for a published model
    as_json      print one JSON object a row: row, prompt_tokens, text, tokens, finish ("length",
                 "stop", "nan", "interrupted"), seconds, tokens_per_second (without the first
                 block, which compiles; null if there is no other)
    """
    choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = settings.read(Sampling, choices, where="generate")
    _check(prompt, prompt_file, steps, batch, stop, save_state, state)
    _check_begun(chat, system, read_twice, state)
    lm = store.load(model, max_length=max_length)
    tokenizer = store.load_tokenizer(model, lm)
    session = Session(lm) if state is None else Session.load(lm, state)
    said = _again(prompt, prompt_file, tokenizer, lm.prefix) if read_twice else prompt
    given = said, prompt_file, tokenizer
    ids = _conversation(*given, system) if chat else _ids(*given, marked=state is None)
    read = _feed(session, ids, state)
    run = Run(session.fork(batch), tokenizer, sampling, seed, stop, exact=save_state is not None)
    live = not as_json and len(run.rows) == 1
    with Terminal() as terminal:
        if live and prompt is not None:
            terminal.echo(prompt + "\n" * chat)
        _show(run, steps, terminal, live)
    for b in range(len(run.rows)):
        terminal.show(_line(run, b, read, live, as_json), end="\n")
    if save_state is not None:
        run.session.save(save_state)
    _require_numbers(run, model)
    return 130 if terminal.stopped else 0


def _show(run: "Run", steps: int, terminal: Terminal, live: bool) -> None:
    """Go on for so many steps; text is shown as it comes if `live`."""
    for _ in run.go(steps, terminal, PACE if live else None):
        if live:
            terminal.show(run.rows[0].ready())


def _require_numbers(run: "Run", model: pathlib.Path) -> None:
    if any(row.finish == "nan" for row in run.rows):
        raise ModelError(f"The logits of {model} are not finite: its weights are damaged.")


def _line(run: "Run", b: int, read: int, live: bool, as_json: bool) -> str:
    """What is printed of row b at the end; where it was shown as it came, the rest of it."""
    row = run.rows[b]
    if as_json:
        return json.dumps({"row": b, "prompt_tokens": read, **run.report(b)})
    return row.ready() if live else f"--- {b}: {row.finish} ---\n{row.text}"


class Run:
    """One generation: the session, and the text of its rows so far.

    `exact` keeps the session right behind the last token of each row's text, even where a stop
    string ended a row within a block: the block is then run again up to there.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int,
        stop: str | None,
        *,
        exact: bool,
    ):
        self.session, self._options = session, {"seed": seed, "stop": tokenizer.stops or None}
        self._sampling, self._rewinds = sampling, exact and stop is not None
        self.rows = [text.Row(tokenizer.stream(), stop) for _ in range(session.batch)]
        self._seconds = self._later_seconds = 0.0
        self._first = np.zeros(session.batch, int)

    def go(self, steps: int, terminal: Terminal, pace: float | None) -> Iterator[None]:
        """Yields after every block of tokens, of `pace` seconds each if given."""
        left = np.full(self.session.batch, steps)
        size = self.session.block if pace is None else 1
        while left.any() and not terminal.stopped:
            began = time.perf_counter()
            taken = self._block(np.minimum(left, size))
            self._count(taken, time.perf_counter() - began)
            rows = zip(self.rows, self.session.finish, strict=True)
            going = [row.finish is None and finish == "length" for row, finish in rows]
            left = np.where(going, left - taken, 0)
            if pace is not None:
                size = int(np.clip(size * pace / (time.perf_counter() - began), 1, 64))
            yield
        for row, finish, more in zip(self.rows, self.session.finish, left, strict=True):
            row.close("interrupted" if more else finish)

    def report(self, b: int) -> dict:
        """What became of row b, ready for JSON."""
        row, later = self.rows[b], len(self.rows[b].tokens) - int(self._first[b])
        return {
            "text": row.text,
            "tokens": row.tokens,
            "finish": row.finish,
            "seconds": round(self._seconds, 3),
            "tokens_per_second": round(later / self._later_seconds, 1) if later else None,
        }

    def _count(self, taken: np.ndarray, seconds: float) -> None:
        if self._seconds:
            self._later_seconds += seconds
        else:
            self._first = taken
        self._seconds += seconds

    def _block(self, limits: np.ndarray) -> np.ndarray:
        """Up to limits[b] more tokens; how many of them each row took [B]."""
        before = self.session.fork() if self._rewinds else None
        taken = counts = np.zeros_like(limits)
        for tokens, counts in self._generate(limits):
            ids = (row[:n] for row, n in zip(tokens, counts, strict=True))
            taken = np.array([row.take(i) for row, i in zip(self.rows, ids, strict=True)])
        if before is not None and (taken < counts).any():
            self.session = before
            list(self._generate(taken))
        return taken

    def _generate(self, limits: np.ndarray) -> Iterator[Block]:
        return self.session.generate(limits, self._sampling, **self._options)


def _check(prompt, prompt_file, steps, batch, stop, save_state, state) -> None:
    if prompt is not None and prompt_file is not None:
        raise ConfigError("Give either --prompt or --prompt-file, not both.")
    if prompt is None and prompt_file is None and state is None:
        raise ConfigError("There is nothing to continue: give --prompt, --prompt-file or --state.")
    if prompt == "":
        raise DataError("The prompt is empty: give at least one character.")
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")
    if stop == "":
        raise ConfigError("The stop string is empty: give at least one character, or no --stop.")
    if save_state is not None and save_state.exists() and not save_state.is_file():
        raise ConfigError(f"--save-state {save_state} is no ordinary file: choose another name.")
    if save_state is not None and not save_state.resolve().parent.is_dir():
        raise ConfigError(f"The folder of --save-state {save_state} does not exist: create it.")


def _check_begun(
    chat: bool, system: str | None, read_twice: bool, state: pathlib.Path | None
) -> None:
    if system is not None and not chat:
        raise ConfigError("--system is a message of a conversation: give --chat too.")
    if chat and state is not None:
        raise ConfigError("--chat begins a conversation, and --state goes on: give one of them.")
    if read_twice and state is not None:
        raise ConfigError("--read-twice begins a text, and --state goes on: give one of them.")


def _feed(session: Session, ids, state: pathlib.Path | None) -> int:
    """How many ids the session took; none is well if `state` holds a text that has not ended."""
    if ids is None:
        if "length" not in session.finish:
            raise ModelError(f"The text in {state} has ended: give a prompt to go on.")
        return 0
    before = session.position[0] if session.batch else 0
    session.feed(ids)
    return int(session.position[0] - before)


def _ids(
    prompt: str | None, prompt_file: str | None, tokenizer: Tokenizer, *, marked: bool
) -> Iterator[np.ndarray] | None:
    """The ids of the prompt, in pieces, if there is one; what stands before a document first where
    one begins."""
    if prompt is None and prompt_file is None:
        return None
    whole = not isinstance(tokenizer, ByteTokenizer)
    pieces = iter([prompt]) if prompt is not None else text.read(prompt_file or "-", whole=whole)
    start = [np.array(tokenizer.start)] if marked and tokenizer.start else []
    return itertools.chain(start, (np.array(tokenizer.encode(p), np.int32) for p in pieces))


def _again(prompt: str | None, prompt_file: str | None, tokenizer: Tokenizer, prefix: int) -> str:
    """The prompt as often as it is to be read."""
    return text.repeated(_text(prompt, prompt_file), tokenizer.encode, prefix)


def _text(prompt: str | None, prompt_file: str | None) -> str:
    return prompt if prompt is not None else "".join(text.read(prompt_file or "-", whole=True))


def _conversation(
    prompt: str | None, prompt_file: str | None, tokenizer: Tokenizer, system: str | None
) -> np.ndarray:
    """The ids of a conversation that the prompt begins."""
    if not isinstance(tokenizer, PublishedTokenizer):
        raise ModelError("This model has no chat template: give its prompt without --chat.")
    said = _text(prompt, prompt_file)
    messages = [] if system is None else [{"role": "system", "content": system}]
    return np.array(tokenizer.chat([*messages, {"role": "user", "content": said}]), np.int32)
