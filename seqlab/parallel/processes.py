"""Many processes as one program, on JAX's own distributed runtime: joining, and agreeing.

Every process runs the same program on its own devices, and each collective needs them all. So what
a process sees alone (a signal, a file, a lock) must be told to all before anything depends on it.
"""

import contextlib
import json
import math
import os
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab import errors
from seqlab.errors import ConfigError, SeqlabError
from seqlab.launch import several_are_meant

CRASHED = 70  # exit code of a process that ends by an error that is not the user's
LAST = 6.0  # seconds: the end of process 0 ends all, so it lets the others say why they end

Distributed = Literal["auto", "on", "off"]


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: Distributed = "auto",
    heartbeat: float = 10,
    join: float = 300,
) -> None:
    """Join the other processes, if there are any; to be called before JAX is used.

    By hand: `coordinator` is "host:port" of process 0. Otherwise "auto" joins where a scheduler
    says that several processes are meant, "on" wherever JAX finds one, "off" never. They
    wait `join` seconds for the last. The runtime aborts all processes when it has not heard of one
    for three times `heartbeat`: before that we can say why (see `train.watchdog`).
    """
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) and not all(given):
        raise ConfigError(
            "--coordinator, --processes and --process-id go together: give all three."
        )
    if all(given):
        assert coordinator is not None and processes is not None and process_id is not None
        _check_by_hand(coordinator, processes, process_id)
        if processes == 1:
            return
        _reach(coordinator, process_id, join)
    elif distributed == "off" or (distributed == "auto" and not several_are_meant()):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            cluster_detection_method="deactivate" if all(given) else None,
            initialization_timeout=int(join),
            heartbeat_timeout_seconds=math.ceil(3 * heartbeat),
            shutdown_timeout_seconds=30,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"The processes could not be joined ({reason}): give --coordinator, --processes and "
            "--process-id, or --distributed off for a single one."
        ) from error
    _check_devices()


def first() -> bool:
    """Whether this is process 0, which alone speaks, logs and writes."""
    return jax.process_index() == 0


def once(act: Callable[[], Any]) -> Any:
    """What `act` returns on process 0, which alone calls it; JSON. All raise its SeqlabError."""
    if jax.process_count() == 1:
        return act()
    said: dict[str, Any] = {}
    if first():
        try:
            said = {"value": act()}
        except SeqlabError as error:
            said = {"error": type(error).__name__, "text": str(error)}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = multihost_utils.broadcast_one_to_all(_padded(text if first() else text[:0], length))
    said = json.loads(sent[:length].tobytes())
    if "error" in said:
        raise getattr(errors, said["error"])(said["text"])
    return said["value"]


def everyone(value: Any) -> list[Any]:
    """The JSON `value` of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    rows = multihost_utils.process_allgather(_padded(text, int(lengths.max())))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def alike(act: Callable[[], Any]) -> Any:
    """What `act` returns here; where it raises a SeqlabError in any process, all raise one."""
    value, problem = None, None
    try:
        value = act()
    except SeqlabError as error:
        problem = error
    told = everyone(problem and [type(problem).__name__, str(problem)])
    if problem is not None:
        raise problem
    for process, other in enumerate(told):
        if other is not None:
            raise getattr(errors, other[0])(f"In process {process}: {other[1]}")
    return value


def gathered(tree: Any) -> Any:
    """A pytree of arrays that lie over many processes, whole in each; as it is with one process.

    They lie on one device of each process.
    """
    if jax.process_count() == 1:
        return tree
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    whole = jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.tree.map(lambda array: array.addressable_data(0), whole)


def wait_for_all(name: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """With many processes, an error in here ends this one now, told in one line or with its stack.

    At its usual end a process waits for the others, and they, in a collective, would wait for it.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = getattr(error, "code", CRASHED)
        if isinstance(error, SeqlabError):
            print(f"seqlab: {error}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if first():
            time.sleep(LAST)
        os._exit(code if isinstance(code, int) else CRASHED)


class Vote:
    """The largest number that any process gives, known one call later, so that nobody waits.

    With one process it is the number given. Every process calls it equally often.
    """

    def __init__(self):
        self._pending: jax.Array | None = None
        devices = jax.devices()
        self._mesh = jax.make_mesh((len(devices),), ("all",), (AxisType.Auto,), devices=devices)
        self._max = jax.jit(
            lambda values: values.max(), out_shardings=NamedSharding(self._mesh, P())
        )

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        before, spread = self._pending, NamedSharding(self._mesh, P("all"))
        with jax.set_mesh(self._mesh):
            values = jax.make_array_from_callback(
                (self._mesh.size,), spread, lambda index: np.full(1, number, np.int32)
            )
            self._pending = self._max(values)
        return 0 if before is None else int(before.addressable_data(0))


def _padded(text: np.ndarray, length: int) -> np.ndarray:
    """Bytes with zeros after them; few sizes, because each is a program to compile."""
    return np.pad(text, (0, max(256, 1 << (length - 1).bit_length()) - len(text)))


def _check_by_hand(coordinator: str, processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator {coordinator!r} is not of the form HOST:PORT.")
    if not 0 <= process_id < processes:
        raise ConfigError(
            f"--process-id {process_id} is not one of {processes} processes: number them from 0."
        )


def _reach(coordinator: str, process_id: int, seconds: float) -> None:
    """Wait until process 0 listens: the runtime itself would abort without a word of why."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while process_id:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"Process {process_id} found nobody at {coordinator} in {seconds:g} s "
                    f"({error.strerror or error}): start process 0 there, or mend --coordinator."
                ) from error
            time.sleep(0.2)


def _check_devices() -> None:
    """JAX can only agree on anything where all processes have equally many devices."""
    counts = Counter(device.process_index for device in jax.devices())
    for process, count in sorted(counts.items()):
        if count != counts[0]:
            raise ConfigError(
                f"Process 0 has {counts[0]} devices but process {process} has {count}: give every "
                "process as many."
            )
