"""Many processes train one run: they mean the same, and every device of theirs has its part."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from seqlab.errors import ConfigError
from seqlab.parallel import processes
from seqlab.train.config import Config
from seqlab.train.folder import describe, difference


def refuse_differences(config: Config, record: Mapping[str, Any]) -> None:
    """Raises ConfigError, in every process, naming the first field in which one differs from
    process 0. Hashes are compared first, so that many processes exchange little."""
    if jax.process_count() == 1:
        return
    mine = {
        **describe(config, record),
        "the version of jax": jax.__version__,
        "the platform": jax.default_backend(),
        "the code of seqlab": _code(),
    }
    text = json.dumps(mine, sort_keys=True)
    hashes = processes.everyone(_hash(text.encode()))
    process = next((i for i, other in enumerate(hashes) if other != hashes[0]), None)
    if process is None:
        return
    of = processes.everyone(mine if jax.process_index() in (0, process) else None)
    name, one, other = difference(of[0], of[process]) or ("", "", "")
    raise ConfigError(
        f"The processes were given different runs: {name} is {one} in process 0 and {other} in "
        f"process {process}; start all of them with the same config, overrides and versions."
    )


def _code() -> str:
    """A hash of the package's sources: machines can hold different copies of one version."""
    files = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    return _hash(b"".join(file.read_bytes() for file in files))[:12]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def over_all_devices(config: Config) -> Config:
    """The config with `mesh.data` so large that the mesh spans every device of many processes.

    So one config runs in one process or in many. Raises ConfigError where that does not fit.
    """
    m, devices = config.mesh, jax.device_count()
    need = m.data * m.seq * m.model
    if jax.process_count() == 1 or need == devices:
        return config
    if devices % need:
        raise ConfigError(
            f"The mesh data={m.data} x seq={m.seq} x model={m.model} does not fit the {devices} "
            f"devices of {jax.process_count()} processes: make their number a multiple of {need}."
        )
    wider = dataclasses.replace(m, data=m.data * devices // need)
    return dataclasses.replace(config, mesh=wider)
