"""How a process of many begins and ends: whether several are meant, and a parent that sees the end.

JAX's runtime aborts a process whose peers are gone or never came, and no Python code runs then. So
the process that was started keeps to waiting, does the work in a child, and turns its end into one
sentence and an exit status of ours. JAX must not have started by then: it cannot be forked.
"""

import os
import signal
import sys
import threading
from types import FrameType

PEER_GONE = 76  # exit status where another process is gone
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def several_are_meant() -> bool:
    """Whether a scheduler started this process as one of several that belong together."""
    there = os.environ.get
    if there("SLURM_STEP_NODELIST"):  # set by srun, and not in the script that calls it
        return int(there("SLURM_NTASKS", "1")) > 1
    hosts = there("TPU_PROCESS_ADDRESSES") or there("TPU_WORKER_HOSTNAMES") or ""
    named = " " not in hosts  # libtpu writes a sentence there where it finds none
    return ("," in hosts and named) or int(there("MEGASCALE_NUM_SLICES") or 1) > 1


def go_on_in_a_child() -> None:
    """Return in a child process; this one waits for it, passes signals on as SIGUSR1 (which asks
    to stop; a scheduler may have sent the child the same signal) and exits as it did.

    A second signal kills the child, and so does the death of this process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
        return
    os.close(alive)
    os._exit(_watch(child))


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the parent is gone and its end of the pipe is closed
    os._exit(128 + signal.SIGKILL)


def _watch(child: int) -> int:
    """The exit status of the child, an abort and a kill told in a sentence."""
    came: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        came.append(number)
        passed = signal.SIGUSR1 if len(came) == 1 else signal.SIGKILL
        os.kill(child, passed)
        _say(f"{signal.Signals(number).name} came and is passed on as {passed.name}.")

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        return code
    if came:
        return 128 + came[0]
    if code == -signal.SIGABRT:
        _say(
            "JAX's runtime ended this process because another one is gone or never came (its "
            "words are above); run the same command on every machine to go on from the last "
            "checkpoint."
        )
        return PEER_GONE
    _say(f"this process was ended by {signal.Signals(-code).name}.")
    return 128 - code


def _say(text: str) -> None:
    print(f"seqlab: {text}", file=sys.stderr, flush=True)
