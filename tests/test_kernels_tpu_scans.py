"""TPU kernels of the elementwise scans: interpreted against the definitions, with memory that
nothing has written as NaN, and compiled for TPUs inside of a train step."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ModelError
from seqlab.kernels.linear_scan import Complex, linear_scan
from seqlab.kernels.linear_scan import pallas_tpu as linear_tpu
from seqlab.kernels.selective_scan import pallas_tpu as selective_tpu
from seqlab.kernels.selective_scan import selective_scan
from seqlab.layers.mixers import mamba, rg_lru
from seqlab.models import lm
from seqlab.plan import programs, topology
from seqlab.train.config import Config, Mesh
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

BY_STEP = pltpu.InterpretParams(uninitialized_memory="nan")
CHUNK = 16


def selective(B, T, E, N, dtype):
    """dt that wipes out everything among small ones; reset, and all that has a gradient."""
    rng = np.random.default_rng(0)
    wide = np.promote_types(dtype, np.float32)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    dt = rng.exponential(size=(B, T, E)) * np.where(rng.random((B, T, E)) < 0.1, 80, 0.3)
    A, state = -2 * rng.random((E, N)), rng.normal(size=(B, E, N))
    tokens = draw(B, T, E), dt.astype(wide), draw(B, T, 1, N), draw(B, T, 1, N)
    return rng.random((B, T)) < 0.1, (*tokens, A.astype(wide), state.astype(wide))


def elementwise(kind, B, T, E, dtype):
    """Numbers of any size below 1, some that wipe out everything; reset, and the rest."""
    rng = np.random.default_rng(0)
    draw: Any = lambda *shape: rng.normal(size=shape).astype(dtype)
    size: Any = np.where(rng.random((B, T, E)) < 0.1, 0, rng.random((B, T, E))).astype(dtype)
    reset, angle = rng.random((B, T)) < 0.1, draw(B, T, E)
    if kind == "real":
        return reset, (size, draw(B, T, E), draw(B, E))
    pair = lambda *shape: Complex(draw(*shape), draw(*shape))
    a = Complex(size * np.cos(angle), size * np.sin(angle))
    return reset, (a, pair(B, T, E), pair(B, E))


def run_selective(f, reset, floats, **options):
    *tokens, A, state = floats
    return f(*tokens, reset, A, state, **options)


def run_elementwise(f, reset, floats, **options):
    a, b, state = floats
    return f(a, b, reset, state, **options)


def values_and_gradients(run, reset, floats):
    """Results of `run` and what a fixed cotangent of them gives, of all floats."""

    @jax.jit
    def both(floats):
        out, pull = jax.vjp(lambda floats: run(reset, floats), floats)
        weights = lambda a: jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
        return out, pull(jax.tree.map(lambda a: weights(a).astype(a.dtype), out))

    return both(jax.tree.map(jnp.asarray, floats))


def compare(run, kernel, known, args):
    """A kernel with the definition, or another form of it."""
    actual = values_and_gradients(functools.partial(run, kernel), *args)
    expected = values_and_gradients(functools.partial(run, known), *args)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)
    dtypes = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]
    assert dtypes(actual) == dtypes(expected)


def compare_selective(args, interpret, known="reference"):
    kernel = functools.partial(selective_tpu.chunked, chunk_size=CHUNK, interpret=interpret)
    compare(run_selective, kernel, functools.partial(selective_scan, implementation=known), args)


def compare_elementwise(args, interpret):
    kernel = functools.partial(linear_tpu.scanned, interpret=interpret)
    definition = functools.partial(linear_scan, implementation="reference")
    compare(run_elementwise, kernel, definition, args)


def test_the_selective_scan_equals_the_definition_over_chunks_and_blocks_of_channels(monkeypatch):
    monkeypatch.setattr(selective_tpu, "WIDTHS", (128,))
    with jax.enable_x64(True):
        compare_selective(selective(2, 41, 256, 16, np.float64), interpret=True)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_the_linear_scan_equals_the_definition_over_chunks_and_blocks_of_numbers(kind, monkeypatch):
    monkeypatch.setattr(linear_tpu, "BLOCK", CHUNK * 128)
    with jax.enable_x64(True):
        compare_elementwise(elementwise(kind, 2, 41, 384, np.float64), interpret=True)


def test_the_selective_scan_reads_nothing_that_nobody_wrote_and_rounds_as_the_form_in_xla():
    compare_selective(selective(1, 19, 128, 8, jnp.bfloat16), BY_STEP, known="xla")


def test_the_linear_scan_reads_nothing_that_nobody_wrote(monkeypatch):
    monkeypatch.setattr(linear_tpu, "BLOCK", CHUNK * 128)
    compare_elementwise(elementwise("complex", 1, 19, 128, np.float32), BY_STEP)


def test_fewer_tokens_than_a_tile_are_a_chunk():
    compare_elementwise(elementwise("real", 1, 3, 128, np.float32), interpret=True)


def test_what_the_kernels_cannot_do_xla_does():
    cases = (
        (selective_scan, run_selective, selective(1, 5, 64, 8, np.float32), "multiples of 128"),
        (
            linear_scan,
            run_elementwise,
            elementwise("real", 1, 5, 64, np.float32),
            "multiple of 128",
        ),
    )
    for f, run, args, message in cases:
        expected = run(f, *args, implementation="xla")
        jax.tree.map(np.testing.assert_array_equal, run(f, *args), expected)
        with pytest.raises(ModelError, match=message):
            run(f, *args, implementation="pallas_tpu")


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
def test_a_train_step_on_a_mesh_of_tpus_has_the_kernels_of_both_passes():
    """Time is split too: what a device's tokens do to a state is found by the kernels as well."""
    pattern = (mamba.Config(width=256), rg_lru.Config(width=256))
    config = Config(
        model=lm.Config(vocab=64, d_model=32, pattern=pattern, ffn=None),
        data=Data(train=(Tokens(path="none"),), length=64, batch=1),
        mesh=Mesh(seq=2, model=2),
        steps=2,
    )
    there = topology.parse("v5e:2x2").mesh(1, 2, 2)
    schedule = programs.train(programs.for_accelerators(config), there).schedule
    assert schedule is not None
    assert {kernel.name.partition(".")[0] for kernel in schedule.kernels} == {
        "selective_scan_forward",
        "selective_scan_backward",
        "linear_scan_forward",
        "linear_scan_backward",
    }
