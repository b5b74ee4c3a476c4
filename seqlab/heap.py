"""What a CPU's memory costs between two steps of training.

XLA asks the C library anew for the temporary memory of every step, gigabytes of it, which goes back
to the system at the step's end and has to be cleared, page by page, before the next one writes it:
a tenth of the time of a step. So the C library is told to keep what it was given.
"""

import ctypes
import pathlib
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h
DEVICES = pathlib.Path("/dev")
_ACCELERATORS = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd")


def keep() -> bool:
    """Have glibc keep freed memory, on a machine whose only device is its CPU; whether it does.

    Call it before threads start: a thread's own arena maps large blocks whatever is said here.
    """
    if any(True for name in _ACCELERATORS for _ in DEVICES.glob(name)):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])


def trim() -> None:
    """Have glibc give back, this once, what is free: after a program was compiled, 300 MB of it."""
    give = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give is not None:
        give(0)
