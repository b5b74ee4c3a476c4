"""What this machine has, and which implementation each recurrence takes on it."""

import importlib
import importlib.metadata
import pkgutil
import platform

import jax
from rich.markup import escape
from rich.table import Table

from seqlab import kernels
from seqlab.kernels import attention, ternary_matmul
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
    for family in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{family.name}")  # which enters the list
    backend = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    rows = Table("kernel", "here", "all forms", "sharded by", title="implementations")
    for name, recurrence in sorted(RECURRENCES.items()):
        by = "transition" if recurrence.transition else "relay"
        here = recurrence.implementation_on(backend)
        rows.add_row(name, here, ", ".join(recurrence.implementations), by)
    here = "pallas_tpu" if backend == "tpu" else "xla"
    rows.add_row("ternary_matmul", here, ", ".join(ternary_matmul.IMPLEMENTATIONS), "XLA")
    rows.add_row("attention", "xla", ", ".join(attention.IMPLEMENTATIONS), "XLA")
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
