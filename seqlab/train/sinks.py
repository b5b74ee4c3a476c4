"""Where the metrics of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if wanted.

A sink that fails never stops training.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from seqlab.train.metrics import MetricsFile

WARN_EVERY = 100  # failures of one sink between two warnings


class Sink(Protocol):
    """Takes the rows of a run. Any method may raise: `Sinks` sees to it."""

    def log(self, step: int, row: Mapping[str, Any]) -> None: ...

    def sync(self) -> None:
        """Make what was logged safe: a checkpoint is about to stand."""

    def close(self) -> None: ...


class Sinks:
    """Several sinks as one that never raises.

    A failure is told to `warn` in one line, the first of each sink and then every hundredth.
    """

    def __init__(self, sinks: Iterable[Sink], warn: Callable[[str], object] = print):
        self._sinks, self._warn = list(sinks), warn
        self._failures: Counter[int] = Counter()

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        self._each(lambda sink: sink.log(step, row))

    def sync(self) -> None:
        self._each(lambda sink: sink.sync())

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for index, sink in enumerate(self._sinks):
            try:
                act(sink)
            except Exception as error:  # whatever it is, the run is worth more than its log
                self._failed(index, error)

    def _failed(self, index: int, error: Exception) -> None:
        self._failures[index] += 1
        times = self._failures[index]
        if times == 1 or times % WARN_EVERY == 0:
            name = type(self._sinks[index]).__name__
            again = f", {times} times by now" if times > 1 else ""
            self._warn(f"{name} failed{again} ({_reason(error)}); training goes on.")


class TensorBoard:
    """Event files for TensorBoard; events of an earlier run beyond `start_step` are hidden there.

    Events are written in the calling thread, not by tensorboardX's SummaryWriter: when its writer
    thread dies of a full disk, the next rows wait for it forever. Raises ImportError without
    tensorboardX.
    """

    def __init__(self, folder: str | os.PathLike, start_step: int = 0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._proto: Any = event_pb2  # its names exist at run time only
        self._summary: Any = summary_pb2
        Path(folder).mkdir(parents=True, exist_ok=True)
        # The name holds the time in seconds: a run that resumes at once must not take it over.
        self._writer = EventsWriter(str(Path(folder, "events")), f".{start_step}.{os.getpid()}")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step=start_step + 1, session_log=start)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        values = [
            self._summary.Summary.Value(tag=_tag(name), simple_value=number)
            for name, number in _numbers(row).items()
        ]
        self._write(step=step, summary=self._summary.Summary(value=values))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(self._proto.Event(wall_time=time.time(), **fields))
        self._writer.flush()


class WandB:
    """A run on Weights & Biases, named after the run folder and resumed when that run goes on.

    Raises ImportError without wandb, and what `wandb.init` raises.
    """

    def __init__(self, project: str, folder: str | os.PathLike, config: Mapping | None = None):
        import wandb  # pyright: ignore[reportMissingImports] (an extra)

        name = Path(folder).resolve().name
        self._run = wandb.init(
            project=project,
            id=name,
            name=name,
            dir=str(folder),
            config=dict(config or {}),
            resume="allow",
        )

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        self._run.log({_tag(name): number for name, number in _numbers(row).items()}, step=step)

    def sync(self) -> None:
        """Nothing to do: wandb keeps its own log on disk."""

    def close(self) -> None:
        self._run.finish()


def open_sinks(
    folder: str | os.PathLike,
    *,
    start_step: int = 0,
    tensorboard: bool = True,
    wandb_project: str | None = None,
    config: Mapping | None = None,
    warn: Callable[[str], object] = print,
) -> Sinks:
    """The sinks of the run in `folder`, which goes on from `start_step`: later rows are dropped.

    A sink that cannot be opened is left out, with one line to `warn`; only metrics.jsonl must
    open (ConfigError).
    """
    file = MetricsFile(Path(folder, "metrics.jsonl"))
    file.truncate_after(start_step)
    sinks: list[Sink] = [file]
    openers: dict[str, Callable[[], Sink]] = {}
    if tensorboard:
        openers["TensorBoard"] = lambda: TensorBoard(Path(folder, "tensorboard"), start_step)
    if wandb_project:
        openers["Weights & Biases"] = lambda: WandB(wandb_project, folder, config)
    for name, opener in openers.items():
        try:
            sinks.append(opener())
        except ImportError as error:
            warn(f"{name} is off: {error.name} is not installed (pip install 'seqlab[track]').")
        except Exception as error:  # no network, no key, no space: training does not need it
            warn(f"{name} is off ({_reason(error)}).")
    return Sinks(sinks, warn)


def _tag(name: str) -> str:
    held_out = name.startswith("held_out_")
    return f"held_out/{name.removeprefix('held_out_')}" if held_out else f"train/{name}"


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, its step left out; one that is not finite leaves a gap."""
    scalars = {k: v for k, v in row.items() if k != "step" and not isinstance(v, (str, type(None)))}
    return {name: x for name, value in scalars.items() if math.isfinite(x := float(value))}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
