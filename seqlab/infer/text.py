"""Between tokens and text: prompts read from files in pieces, rows decoded as their tokens come."""

import codecs
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from seqlab.errors import DataError
from seqlab.models.tokenizer import Stream

PIECE = 2**16  # bytes read at once


def read(source: str, *, whole: bool = False) -> Iterator[str]:
    """The text of a UTF-8 file, or of standard input for "-"; in pieces, unless it must be `whole`.

    Raises DataError where it cannot be read, is empty, or is not UTF-8.
    """
    name = "standard input" if source == "-" else source
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if source == "-" else stack.enter_context(open(source, "rb"))
            while piece := file.read(-1 if whole else PIECE):
                waiting = len(decoder.getstate()[0])
                yield decoder.decode(piece)
                place += len(piece)
            waiting = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except OSError as error:
        raise DataError(
            f"The prompt file {name} cannot be read ({error.strerror}): check the path."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"The prompt in {name} is not UTF-8 at byte {place - waiting + error.start}: save it "
            "as UTF-8."
        ) from None
    if place == 0:
        raise DataError(f"The prompt in {name} is empty: give at least one character.")


def repeated(text: str, encode: Callable[[str], Sequence[int]], prefix: int) -> str:
    """The text twice, each copy from a line of its own on, or as often as it takes for it to be
    longer than a prefix of so many tokens (JRT-Prompt; Arora et al., 2024).

    A model with a prefix predicts the next token only from beyond it.
    """
    copy = len(encode(f"{text}\n"))
    times = max(2, 1 + (prefix + 1) // max(copy, 1))
    while 0 < len(encode(again := "\n".join([text] * times))) <= prefix:
        times += 1  # borders took fewer tokens than expected
    return again


class Row:
    """The text of one row: grows by tokens, ends at the stop string, which is cut off."""

    def __init__(self, stream: Stream, stop: str | None = None):
        self.text, self.tokens = "", []
        self.finish: str | None = None  # set when the row ends; "stop" at the stop string
        self._stream, self._stop, self._shown = stream, stop, 0

    def take(self, tokens) -> int:
        """Tokens of the row; returns how many it took: those up to the end of the stop string."""
        ids = [int(token) for token in tokens]
        # One by one where it matters at which token the text ends.
        parts = [ids] if self._stop is None else [[token] for token in ids]
        before = len(self.tokens)
        for part in parts:
            self.tokens += part
            self._grow(self._stream.push(part))
            if self.finish is not None:
                break
        return len(self.tokens) - before

    def close(self, finish: str) -> None:
        """No more tokens come; `finish` is the reason unless the stop string was."""
        if self.finish is None:
            self._grow(self._stream.flush())
        self.finish = self.finish or finish

    def ready(self) -> str:
        """Text not yet returned here, except what may turn out to begin the stop string."""
        end = len(self.text)
        if self.finish is None and self._stop is not None:
            longest = min(len(self._stop) - 1, end)
            prefixes = (n for n in range(longest, 0, -1) if self.text.endswith(self._stop[:n]))
            end -= next(prefixes, 0)
        new, self._shown = self.text[self._shown : end], max(end, self._shown)
        return new

    def _grow(self, new: str) -> None:
        start = max(0, len(self.text) - len(self._stop or "") + 1)
        self.text += new
        at = -1 if self._stop is None else self.text.find(self._stop, start)
        if at >= 0:
            self.text, self.finish = self.text[:at], "stop"
