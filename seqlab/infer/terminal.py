"""Where generated text goes, and where Ctrl-C comes from."""

import io
import os
import signal
import sys
import threading
from typing import Any

#: What could move the cursor, ring or recolour; newline and tab may pass.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Terminal:
    """Standard output, written as text comes; inside `with`, the first Ctrl-C sets `stopped`
    instead of raising, and a second one raises as ever.

    A model can produce any character: control characters reach files and pipes as they are, but
    not a screen. When the reader of a pipe goes away, that is a stop too, not an error.
    """

    def __init__(self):
        self.stopped = False
        self._previous: Any = None
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character

    def __enter__(self) -> "Terminal":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def echo(self, prompt: str) -> None:
        """Show the prompt, dimmed, before its continuation; files and pipes get only the latter."""
        if sys.stdout.isatty():
            sys.stdout.write(f"\x1b[2m{prompt.translate(_CONTROLS)}\x1b[0m")
            sys.stdout.flush()

    def show(self, text: str, end: str = "") -> None:
        """Write at once."""
        if sys.stdout.isatty():
            text = text.translate(_CONTROLS)
        try:
            sys.stdout.write(text + end)
            sys.stdout.flush()
        except BrokenPipeError:
            self.stopped = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _stop(self, *_) -> None:
        self.stopped = True
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
