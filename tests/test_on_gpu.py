"""GPU kernels as the GPU here runs them, against the definitions on the CPU in float64.

pytest -m gpu
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import FORWARD, GRADIENT, allowed, worst
from seqlab.kernels import families
from seqlab.kernels.on_gpu import chunk_scan, trust
from seqlab.kernels.recurrence import RECURRENCES
from seqlab.kernels.ternary_matmul import ternary_matmul

families.enter_all()

EVERY = [(name, dtype) for name, dtypes in trust.DTYPES.items() for dtype in dtypes]


@pytest.fixture(autouse=True)
def gpu():
    if trust.gpu_kind() is None:
        pytest.skip("there is no NVIDIA GPU here, or JAX has no plugin for it")


def expected(name: str, trial: trust.Trial):
    """Results and gradients of the definition, with the options of the form in XLA."""
    family = name.removesuffix(chunk_scan.OF_CHANNELS)
    run, options = {**RECURRENCES, "ternary_matmul": ternary_matmul}[family], {}
    if isinstance(trial.xla, functools.partial):
        options = trial.xla.keywords
    definition = functools.partial(run, implementation="reference", **options)
    wide = lambda a: np.asarray(a, np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
    args = jax.tree.map(wide, trial.args)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        found = trust.values_and_gradients(definition, args, trial.read)
        return jax.tree.map(np.asarray, found)


@pytest.mark.gpu
@pytest.mark.parametrize("name, dtype", EVERY)
def test_a_kernel_equals_the_definition(name, dtype):
    trial = trust.TRIALS[name](jnp.dtype(dtype))
    actual = trust.values_and_gradients(trial.kernel, trial.args, trial.read)
    away = map(worst, actual, expected(name, trial))
    for (wrong, path), table in zip(away, (FORWARD, GRADIENT), strict=True):
        assert wrong <= allowed(dtype, table), f"{path}: error {wrong:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("name, dtype", EVERY)
def test_a_kernel_is_trusted(name, dtype):
    assert trust.objection(name, str(trust.gpu_kind()), dtype) is None
