"""Tasks that tell memories apart, by name: the files of this folder that define a `Config`."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from seqlab import settings
from seqlab.errors import ConfigError, nearest
from seqlab.tasks.contract import (
    IGNORE,
    TEST_SEEDS,
    Accuracy,
    Examples,
    Protocol,
    Task,
    accuracy,
    read_twice,
)

__all__ = [
    "IGNORE",
    "TEST_SEEDS",
    "Accuracy",
    "Examples",
    "Protocol",
    "Task",
    "accuracy",
    "protocol",
    "protocols",
    "read_twice",
    "task_config",
    "tasks",
]


def tasks() -> list[str]:
    """The names of every task."""
    return sorted(name for name in _files() if hasattr(_module(name), "Config"))


def task_config(name: str, /, **fields: Any) -> Any:
    """The Config of the task called `name`; raises ConfigError for an unknown name or field."""
    return settings.read(_task(name).Config, fields, where=name)


def protocols(task: str) -> dict[str, Protocol]:
    """The protocols of a task by their names; "ci" is the one for a CPU, others are published."""
    return dict(_task(task).PROTOCOLS)


def protocol(task: str, name: str = "ci") -> Protocol:
    """One protocol of a task; raises ConfigError for an unknown name."""
    known = protocols(task)
    if name not in known:
        raise ConfigError(f"The task {task} has no protocol {name!r}: {nearest(name, known)}")
    return known[name]


def _task(name: str) -> ModuleType:
    if name not in (known := tasks()):
        raise ConfigError(f"There is no task {name!r}: {nearest(name, known)}")
    return _module(name)


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
