"""The machine that figures are of: what it is, how busy it is, and what memory it has left."""

import datetime
import os
import pathlib
import platform
from typing import Any

import jax

from seqlab.doctor import version
from seqlab.errors import ConfigError, nearest
from seqlab.train import readable

#: JAX's platforms for a kind of device; with the CPU behind it, since a missing GPU is no error.
DEVICES = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
PACKAGES = ("jax", "jaxlib", "numpy")
BESIDE = ("torch", "transformers")  # of peers, where they are installed


def take(device: str | None) -> None:
    """Measure on devices of this kind, where the default is another. Raises ConfigError where there
    are none. Call it before anything else starts JAX."""
    if device is None:
        return
    if device not in DEVICES:
        raise ConfigError(f"There is no kind of device {device!r}: {nearest(device, DEVICES)}")
    before = jax.config.jax_platforms  # pyright: ignore
    jax.config.update("jax_platforms", DEVICES[device])
    try:
        found = jax.default_backend()
    except RuntimeError:
        found = "none"
    if found != device:
        jax.config.update("jax_platforms", before)
        raise ConfigError(f"This machine has no {device} that JAX can use: see `seqlab doctor`.")


def describe() -> dict[str, Any]:
    """What figures depend on beside the code: the machine, versions, and what else was running."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "processor": processor(),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        **{package: here for package in BESIDE if (here := version(package))},
        "load": round(os.getloadavg()[0], 1),
    }


def name() -> str:
    """The device as a part of a file's name: cpu, tpu_v5_lite, nvidia_h100_80gb_hbm3."""
    return "_".join(jax.devices()[0].device_kind.lower().replace("-", " ").split())


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The model of the CPU where the system tells (Linux), else its architecture."""
    told = pathlib.Path("/proc/cpuinfo")
    lines = told.read_text("utf-8").splitlines() if told.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def memory(field: str) -> int:
    """Bytes of this process: field "VmRSS" now, "VmHWM" at most so far (Linux)."""
    return _bytes("self/status", field)


def room() -> int | None:
    """Bytes that are free on the device, or on a CPU in the machine; None where nothing tells."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _bytes("meminfo", "MemAvailable") if pathlib.Path("/proc/meminfo").exists() else None
    told = device.memory_stats() or {}
    return told["bytes_limit"] - told["bytes_in_use"] if "bytes_limit" in told else None


def require(program: jax.stages.Compiled, more: int = 0) -> None:
    """Raises ConfigError where less is free than a program needs: what it works with and returns,
    and so many bytes of arguments that are yet to be made."""
    told = program.memory_analysis()
    if told is not None:
        own = told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
        fit(own + more, room())


def fit(needed: int, free: int | None) -> None:
    """Raises ConfigError where so many bytes are more than are free."""
    if free is not None and needed > free:
        raise ConfigError(
            f"Out of memory: it needs {readable.size(needed)} and {readable.size(free)} are free."
        )


def _bytes(file: str, field: str) -> int:
    for line in pathlib.Path("/proc", file).read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{file} has no {field}")
