"""SIGTERM, SIGINT and SIGUSR1 end training after the current step; a second one of the former two
ends it at once."""

import contextlib
import os
import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Within this context, `signal` is the number of the first signal that came, or 0."""

    def __init__(self):
        self.signal = 0
        self._pressed = 0
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._arrived) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number, _frame) -> None:
        self._pressed += number != signal.SIGUSR1
        if self._pressed > 1:
            os._exit(128 + number)  # nothing is half-written: a step appears when it is complete
        if self.signal:
            return
        self.signal = number
        name = signal.Signals(number).name
        text = f"\n{name}: ending after this step; a second signal ends at once.\n"
        with contextlib.suppress(OSError):  # not print: it may be what was interrupted
            os.write(2, text.encode())
