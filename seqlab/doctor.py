"""What this machine has, and which implementation each recurrence takes on it."""

import importlib.metadata
import platform

import jax
from rich.markup import escape
from rich.table import Table

from seqlab.kernels import attention, families, ternary_matmul
from seqlab.kernels.on_gpu import trust
from seqlab.kernels.recurrence import RECURRENCES

PACKAGES = ("seqlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorstore")
OPTIONAL = {"tokenizers": "hf", "tensorboardX": "track", "wandb": "track"}


def machine() -> Table:
    """Versions and devices."""
    rows = Table("what", "value", title="seqlab doctor")
    rows.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    for package in PACKAGES:
        rows.add_row(package, version(package) or "run from its source folder")
    for package, extra in OPTIONAL.items():
        rows.add_row(package, version(package) or escape(f"absent: pip install 'seqlab[{extra}]'"))
    for kind, count in _counted(device.device_kind for device in jax.devices()).items():
        rows.add_row("devices", f"{count} x {kind} ({jax.default_backend()})")
    return rows


def implementations() -> Table:
    """Every kernel, the forms it has, and the one that is taken here."""
    families.enter_all()
    backend = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    rows = Table("kernel", "here", "all forms", "sharded by", title="implementations")
    for name, recurrence in sorted(RECURRENCES.items()):
        by = "transition" if recurrence.transition else "relay"
        here = recurrence.implementation_on(backend)
        rows.add_row(name, here, ", ".join(recurrence.implementations), by)
    here = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}.get(backend, "xla")
    rows.add_row("ternary_matmul", here, ", ".join(ternary_matmul.IMPLEMENTATIONS), "XLA")
    here = "pallas_tpu" if backend == "tpu" else "xla"
    rows.add_row("attention", here, ", ".join(attention.NAMED), "XLA")
    return rows


def gpu_kernels() -> Table:
    """Each GPU kernel and dtype: the form that is taken here, and what its trial said."""
    families.enter_all()
    kind = trust.gpu_kind()
    rows = Table("kernel", "dtype", "takes", "trial", title="in programs for NVIDIA GPUs")
    for name, dtypes in sorted(trust.DTYPES.items()):
        for dtype in dtypes:
            against = None if kind is None else trust.objection(name, kind, dtype)
            agrees = "no GPU here" if kind is None else f"agrees with XLA on {kind}"
            takes = "xla" if against else "pallas_gpu"
            rows.add_row(name, dtype, takes, escape(against or agrees))
    return rows


def version(package: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _counted(values) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
