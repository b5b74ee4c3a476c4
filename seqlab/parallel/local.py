"""Many processes on this machine's CPU, to try what many machines would do.

python -m seqlab.parallel.local N -- train CONFIG ...

runs `seqlab train CONFIG ...` in N processes that talk over the loopback. JAX_NUM_CPU_DEVICES is
the number of devices of each (1 by default). Output of all but process 0 gets its number as prefix;
signals are passed on; the exit status is that of the first process that failed. On Linux none of
them outlives this one, whatever ends it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent is gone
GRACE = 40.0  # seconds that the others get, to see for themselves that one has failed


def main(arguments: list[str]) -> int:
    """Run the processes; returns the exit status."""
    count, dashes, *command = [*arguments, "", ""][: max(len(arguments), 2)]
    if not (count.isdigit() and int(count) and dashes == "--" and command):
        print("usage: python -m seqlab.parallel.local N -- train CONFIG ...", file=sys.stderr)
        return 2
    port = free_port()
    children = [_start(command, port, int(count), index) for index in range(int(count))]
    threads = [
        threading.Thread(target=_relay, args=(child, index), daemon=True)
        for index, child in enumerate(children[1:], 1)
    ]
    for thread in threads:
        thread.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _pass_on(children, number))
    status = _wait(children)
    for thread in threads:
        thread.join(timeout=5)
    return status


def _start(command: list[str], port: int, count: int, index: int) -> subprocess.Popen:
    place = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
    place += ["--process-id", str(index)]
    name, *rest = command
    environment = {"JAX_NUM_CPU_DEVICES": "1", **os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "seqlab", name, *place, *rest],
        env=environment,
        start_new_session=True,  # Ctrl-C reaches them through us alone, once
        preexec_fn=end_with_parent,
        stdout=subprocess.PIPE if index else None,
        stderr=subprocess.STDOUT if index else None,
    )


def end_with_parent() -> None:
    """In a child before it starts: it is killed when the parent is, which can pass nothing on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _relay(child: subprocess.Popen, index: int) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        sys.stdout.buffer.write(f"[{index}] ".encode() + line)
        sys.stdout.buffer.flush()


def _pass_on(children: list[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _wait(children: list[subprocess.Popen]) -> int:
    """Until all have ended; once one has failed the others have GRACE seconds left."""
    status, end = 0, float("inf")
    while any(child.poll() is None for child in children):
        failed = [child.returncode for child in children if child.returncode]
        if failed and not status:
            status, end = failed[0], time.monotonic() + GRACE
        if time.monotonic() > end:
            _pass_on(children, signal.SIGKILL)
        time.sleep(0.05)
    status = status or next((child.returncode for child in children if child.returncode), 0)
    return 128 - status if status < 0 else status


def free_port() -> int:
    """A port of the loopback that nobody listens on just now."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
