"""GPU kernels that walk in time, and the ternary product: interpreted against the definitions, and
lowered for GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError, ModelError
from seqlab.kernels.fused_rnn import cells, fused_rnn
from seqlab.kernels.fused_rnn import pallas_gpu as rnn_gpu
from seqlab.kernels.on_gpu import blocks, trust, tuning
from seqlab.kernels.selective_scan import pallas_gpu as scan_gpu
from seqlab.kernels.selective_scan import selective_scan
from seqlab.kernels.ternary_matmul import pallas_gpu as ternary_gpu
from seqlab.kernels.ternary_matmul import reference, ternary_matmul
from seqlab.parallel.mesh import use_mesh

NAMES = ("selective_scan", "fused_rnn", "ternary_matmul")


def in_float64(args):
    return jax.tree.map(lambda a: a if a.dtype == bool else a.astype(np.float64), args)


def extreme(args):
    """A strong decay here, none there; a document that starts with the first token of a chunk."""
    u, dt, b, c, reset, A, state = args
    rng = np.random.default_rng(1)
    dt = np.where(rng.random(dt.shape) < 0.1, 80.0, dt) * (rng.random(dt.shape) < 0.9)
    reset[:, 8] = True
    return u, dt, b, c, reset, A, state


CASES = {
    # two programs and a part of one; chunks of two groups and of a part of one; three states
    "selective_scan": (
        scan_gpu.chunked,
        selective_scan,
        lambda: extreme(scan_gpu._arguments(2, 21, 70, 3, np.float32)),
        {"chunk_size": 6},
    ),
    # a program and a part of one
    "fused_rnn": (
        rnn_gpu.scanned,
        fused_rnn,
        lambda: rnn_gpu._arguments(18, 7, 2, 16, np.float32),
        {"cell": cells.slstm},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_definition(name):
    kernel, definition, arguments, options = CASES[name]
    runs = (
        functools.partial(kernel, interpret=True, **options),
        functools.partial(definition, implementation="reference", **options),
    )
    with jax.enable_x64(True):
        args = in_float64(arguments())
        actual, expected = (trust.values_and_gradients(run, args) for run in runs)
        assert_close(actual[0], expected[0])
        assert_close(actual[1], expected[1], GRADIENT)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_kernels_keep_the_dtypes_of_the_form_in_xla(name):
    kernel, xla, args, read = trust.TRIALS[name](jnp.bfloat16)
    kernel = functools.partial(kernel, interpret=True)
    actual, expected = (trust.values_and_gradients(f, args, read) for f in (kernel, xla))
    dtypes = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]
    assert dtypes(actual) == dtypes(expected)
    assert_close(actual[0], expected[0], {**GRADIENT, "float32": GRADIENT["bfloat16"]})
    assert_close(actual[1], expected[1], {**GRADIENT, "float32": GRADIENT["bfloat16"]})


@pytest.mark.parametrize(
    "M, K, N, block",
    [
        (3, 45, 20, (16, 16, 32, 3)),  # fewer inputs than a step takes, and more programs
        (20, 1024, 33, (16, 32, 32, 4)),  # two blocks of inputs in four steps each
        (5, 300, 7, (16, 16, 64, 1)),  # inputs that no step divides
    ],
)
def test_the_ternary_product_is_exact(M, K, N, block):
    x, W = ternary_gpu._arguments(M, K, N)
    y = ternary_gpu.ternary_matmul(x, W, interpret=True, sizes=blocks.Blocks(block, 4))
    np.testing.assert_array_equal(y, reference(x, W))


def lowered(f, args, platform="cuda") -> int:
    """How many GPU kernels a program has that is lowered for a platform."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(r"custom_call @__gpu\$xla.gpu.triton", text))


def gradients(name):
    """The gradient of the recurrence itself, as a layer calls it, and its arguments."""
    _, definition, _, _ = CASES[name]
    options = {"cell": cells.slstm} if name == "fused_rnn" else {}
    args = trust.TRIALS[name](jnp.bfloat16).args

    def run(*args):
        y, state = definition(*args, **options)
        return jnp.sum(y.astype(jnp.float32)) + sum(map(jnp.sum, jax.tree.leaves(state)))

    floats = [i for i, a in enumerate(args) if isinstance(a, tuple) or a.dtype != bool]
    return jax.grad(run, floats), args


@pytest.mark.parametrize("name", CASES)
def test_both_passes_are_kernels_on_a_gpu_alone(name):
    gradient, args = gradients(name)
    assert [lowered(gradient, args, platform) for platform in ("cuda", "cpu")] == [2, 0]


@pytest.mark.parametrize("name", CASES)
def test_so_are_they_on_a_mesh(name):
    gradient, args = gradients(name)
    with use_mesh(data=1, seq=2, model=2):
        assert lowered(gradient, args) >= 2


def test_the_ternary_product_is_a_kernel_on_a_gpu():
    args = ternary_gpu._arguments(1, 512, 64)
    assert [lowered(ternary_matmul, args, platform) for platform in ("cuda", "cpu")] == [1, 0]


def test_what_the_kernels_cannot_do_xla_does():
    args = scan_gpu._arguments(1, 4, 8, 65, np.float32)
    assert lowered(selective_scan, args) == 0
    with pytest.raises(ModelError, match="at most 64 states a channel, not 65"):
        selective_scan(*args, implementation="pallas_gpu")
    args = rnn_gpu._arguments(1, 4, 2, 24, np.float32)
    run = functools.partial(fused_rnn, cell=cells.slstm)
    assert lowered(run, args) == 0
    with pytest.raises(ModelError, match="width is a power of two"):
        run(*args, implementation="pallas_gpu")


def test_a_kernel_that_is_not_trusted_is_in_no_program(monkeypatch):
    monkeypatch.setattr(trust, "trusted", lambda kernel, dtype: False)
    args = ternary_gpu._arguments(1, 512, 64)
    assert lowered(lambda x, W: ternary_matmul(x, W), args) == 0
    for name in CASES:
        assert lowered(*gradients(name)) == 0


@pytest.mark.parametrize("row", blocks.table().values(), ids=lambda row: "-".join(row[:3]))
def test_sizes_in_the_table_are_powers_of_two_and_a_guess_says_so(row):
    assert all(n & (n - 1) == 0 for n in (*row.block, row.warps)) and row.stages > 0
    assert isinstance(row.measured, bool)
    assert row.device != blocks.ANY or not row.measured


def test_every_kernel_has_sizes_for_any_shape_on_any_gpu():
    for name in NAMES:
        shapes = {shape for kernel, device, shape in blocks.table() if kernel == name}
        assert blocks.ANY in shapes or shapes == {"few rows", "many rows"}
    assert blocks.chosen("fused_rnn", "d=128") != blocks.chosen("fused_rnn", "d=64")


def test_tuning_takes_the_fastest_that_compiles_and_needs_a_gpu(monkeypatch):
    def seconds(run, *args):
        sizes = run.__wrapped__.keywords["sizes"]
        if sizes.block[1] == 32:
            raise RuntimeError("does not fit")
        return sizes.block[2] / sizes.warps

    with pytest.raises(ConfigError, match="there is none here"):
        tuning.tune("ternary_matmul")
    with pytest.raises(ConfigError, match="did you mean 'ternary_matmul'"):
        tuning.tune("ternary_mul")
    monkeypatch.setattr(trust, "gpu_kind", lambda: "Pretended")
    few, many = tuning.tune("ternary_matmul", seconds)
    assert few[:3] == ("ternary_matmul", "Pretended", "few rows") and few.measured
    assert few.block[1:3] == (64, 32) and (many.block[2], many.warps) == (32, 8)
