"""Every kernel family, for lists that are only whole when all of them have been imported."""

import importlib
import pkgutil

from seqlab import kernels


def enter_all() -> None:
    """Import each, so that it enters its recurrences, and the trials and contests of its kernels"""
    for family in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{family.name}")
