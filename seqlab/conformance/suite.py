"""Hold a mixer to the contract: `seqlab.check`."""

import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from seqlab import settings
from seqlab.conformance import devices, law, numbers
from seqlab.conformance.report import Finding, Report, Row
from seqlab.conformance.trial import Trial, one_line
from seqlab.errors import ConfigError
from seqlab.layers import registry

Property = Callable[[Trial], Finding]

#: In the order of the report. The name of a row is the function's, with spaces.
PROPERTIES: tuple[Property, ...] = (
    law.pieces_equal_the_whole,
    law.state_shape_is_fixed,
    law.future_is_not_seen,
    law.rows_are_independent,
    law.packed_documents_equal_separate_ones,
    law.documents_do_not_leak,
    law.left_padding_is_forgotten,
    numbers.bfloat16_keeps_a_float32_state,
    numbers.gradients_equal_the_step_form,
    numbers.extreme_inputs_stay_finite,
    numbers.every_parameter_learns,
    devices.compiles_once_per_shape,
    devices.sharded_equals_one_device,
)


def check(
    mixer_config: Any,
    *,
    d_model: int = 32,
    length: int = 40,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> Report:
    """Hold the mixer that a config builds to the contract (see `seqlab.layers.mixer`).

    It runs on two rows of `length` random tokens of width `d_model`, with chunks, windows and
    maximum length made to fit them. `on_row` is called with each row as soon as it is known.
    Raises ConfigError if the config builds nothing; a property that raises is a row that failed.
    """
    if length < 24 or length % 4:
        raise ConfigError(
            f"length={length} is no multiple of 4 from 24 up: documents are cut there."
        )
    trial = Trial(mixer_config, d_model, length, seed)
    rows = []
    for prove in PROPERTIES:
        rows.append(examine(prove, trial))
        if on_row is not None:
            on_row(rows[-1])
    return Report(type(mixer_config).__module__.rpartition(".")[2], tuple(rows))


def examine(prove: Property, trial: Trial) -> Row:
    """One property of a mixer on trial, as a row; an exception fails it."""
    try:
        with jax.default_matmul_precision("highest"):  # so that accelerators round like CPUs
            found = prove(trial)
    except Exception as error:
        return Row(title(prove), False, None, None, one_line(error))
    return Row(title(prove), found.passed, found.error, found.allowed, found.note)


def title(prove: Property) -> str:
    """What a property is called in a report."""
    return prove.__name__.replace("_", " ")


def load_mixer(name_or_file: str | os.PathLike, fields: Iterable[str] = ()) -> Any:
    """The config of a mixer known by name, or defined as `Config` in a Python file (which is run).

    `fields` are `name=value`. Raises ConfigError, in one sentence, if there is no such mixer, file
    or field, or if the file is broken.
    """
    name = os.fspath(name_or_file)
    if name.endswith(".py") or os.sep in name:
        name = registry.register_file(pathlib.Path(name))
    return settings.override(registry.mixer_config(name), fields, name)
