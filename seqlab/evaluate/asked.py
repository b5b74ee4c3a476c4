"""What a command line asks: `mqar length=64,128 needle:ci` as settings of tasks, one by one."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from seqlab import settings
from seqlab.errors import ConfigError
from seqlab.tasks import TEST_SEEDS, protocol, task_config

EXAMPLES = 256


class Setting(NamedTuple):
    """One setting of a task that is to be scored."""

    task: str  # as it was asked, with its protocol
    label: str
    config: Any
    examples: int
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        return settings.plain(self.config)


def parse(words: Sequence[str], examples: int | None = None, seed: int = 0) -> list[Setting]:
    """The settings that words name: TASK with the `field=value` after it, where values joined by
    commas are each a setting; or TASK:PROTOCOL, which are those the protocol tests.

    Raises ConfigError for what is unknown.
    """
    found = []
    for task, assignments in _by_task(words):
        name, colon, of = task.partition(":")
        if not colon:
            found += _swept(name, assignments, examples or EXAMPLES, TEST_SEEDS + seed)
        elif assignments:
            raise ConfigError(
                f"{task} has settings of its own: drop {assignments[0]}, or name {name} alone."
            )
        else:
            tested = protocol(name, of).test
            seeds = itertools.count(protocol(name, of).test_seed(seed))
            found += [
                Setting(task, label, config, examples or count, next(seeds))
                for label, config, count in tested
            ]
    return found


def _by_task(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if "=" not in word:
            found.append((word, []))
        elif not found:
            raise ConfigError(f"{word} comes before any task: name the task first.")
        else:
            found[-1][1].append(word)
    return found


def _swept(task: str, assignments: list[str], examples: int, seed: int) -> list[Setting]:
    config = task_config(task)
    choices = []
    for assignment in assignments:
        name, _, values = assignment.partition("=")
        choices.append([f"{name}={value}" for value in values.split(",")])
    return [
        Setting(task, " ".join(chosen), settings.override(config, chosen, task), examples, seed)
        for chosen in itertools.product(*choices)
    ]
