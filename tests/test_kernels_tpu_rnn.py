"""TPU kernels of the recurrences that RWKV-7 and non-linear cells run: interpreted against the
definitions with memory that nothing has written as NaN, and compiled for TPUs."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ModelError
from seqlab.kernels.diagonal_plus_low_rank import diagonal_plus_low_rank as low_rank
from seqlab.kernels.diagonal_plus_low_rank import pallas_tpu as low_rank_tpu
from seqlab.kernels.fused_rnn import cells, fused_rnn, layout_tpu
from seqlab.kernels.fused_rnn import pallas_tpu as fused_rnn_tpu
from seqlab.layers.mixers import rwkv7, slstm
from seqlab.models import lm
from seqlab.parallel.mesh import make_mesh
from seqlab.plan import programs, topology
from seqlab.train.config import Config, Mesh
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

BY_STEP = pltpu.InterpretParams(uninitialized_memory="nan")
#: Gates and arrays of the state of each cell.
SIZES = {cells.elman: (1, 1), cells.gru: (3, 1), cells.lstm: (4, 2), cells.slstm: (4, 4)}


def rnn_tokens(cell, B, T, H, d, dtype):
    """wx, reset, R, bias and a state that some tokens have left."""
    gates, leaves = SIZES[cell]
    rng = np.random.default_rng(T)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    wide = np.promote_types(dtype, np.float32)
    state = [draw(B, H, d).astype(wide) for _ in range(leaves)]
    if cell is cells.slstm:
        state[2] = np.abs(state[2]) + 1
    reset, R = rng.random((B, T)) < 0.1, draw(H, d, gates, d) * np.asarray(d**-0.5, dtype)
    return draw(B, T, H, gates, d), reset, R, draw(H, gates, d).astype(wide), tuple(state)


def low_rank_tokens(H, K, V, channels, dtype, B=1, T=40):
    """Two whole chunks and a part of one, with documents and gates that wipe out everything."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    q, k, a = (draw(B, T, H, K) for _ in "qka")
    a /= -np.linalg.norm(a, axis=-1, keepdims=True)
    weak = -rng.exponential(size=(B, T, H, channels)) * 0.3
    log_decay = np.where(rng.random(weak.shape) < 0.1, -80.0, weak)
    floats = q, k, draw(B, T, H, V), a, -a * rng.random((B, T, H, 1)), log_decay
    reset, state = rng.random((B, T)) < 0.06, draw(B, H, K, V)
    return *(x.astype(dtype) for x in floats), reset, state.astype(dtype)


def values_and_gradients(run, floats, reset):
    """Results of `run` and what a fixed cotangent of them gives, of all arguments but reset."""

    @jax.jit
    def both(floats):
        out, pull = jax.vjp(lambda floats: run(floats, reset), floats)
        weights = lambda a: jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
        return out, pull(jax.tree.map(lambda a: weights(a).astype(a.dtype), out))

    return both(floats)


def compare(kernel, known, floats, reset):
    actual, expected = (values_and_gradients(run, floats, reset) for run in (kernel, known))
    dtypes = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]
    assert dtypes(actual) == dtypes(expected)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)


def compare_rnn(cell, args, interpret, expected="reference"):
    wx, reset, *others = args
    called = lambda run: lambda floats, reset: run(floats[0], reset, *floats[1:], cell=cell)
    kernel = functools.partial(fused_rnn_tpu.scanned, interpret=interpret)
    known = functools.partial(fused_rnn, implementation=expected)
    compare(called(kernel), called(known), (wx, *others), reset)


def compare_low_rank(args, interpret):
    *floats, reset, state = args
    called = lambda run: lambda floats, reset: run(*floats[:-1], reset, floats[-1])
    kernel = functools.partial(low_rank_tpu.chunked, chunk_size=16, interpret=interpret)
    known = functools.partial(low_rank, implementation="reference")
    compare(called(kernel), called(known), (*floats, state), reset)


@pytest.mark.parametrize(
    "cell, H, d",
    [
        (cells.slstm, 2, 64),  # two a step, so that a row is full
        (cells.lstm, 1, 128),
        (cells.gru, 1, 128),
    ],
)
def test_cells_on_a_tpu_equal_the_definition(cell, H, d):
    with jax.enable_x64(True):  # a whole chunk and a part of one
        compare_rnn(cell, rnn_tokens(cell, 2, 70, H, d, np.float64), interpret=True)


def test_rows_in_blocks_share_one_gradient_of_weights(monkeypatch):
    args = rnn_tokens(cells.elman, 16, 17, 1, 128, np.float32)
    monkeypatch.setattr(layout_tpu, "VMEM", 1_350_000)
    blocks = layout_tpu.blocks_of(args[0], args[2], args[4])
    assert blocks is not None and (blocks.rows, blocks.size) == (8, 16)
    compare_rnn(cells.elman, args, BY_STEP)


def test_in_bfloat16_cells_round_where_the_form_in_xla_does():
    args = rnn_tokens(cells.elman, 1, 20, 1, 128, jnp.bfloat16)
    compare_rnn(cells.elman, args, interpret=True, expected="xla")


def test_what_the_kernel_of_cells_cannot_do_xla_does():
    args = rnn_tokens(cells.gru, 1, 5, 2, 8, np.float32)
    expected = fused_rnn(*args, cell=cells.gru, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, fused_rnn(*args, cell=cells.gru), expected)
    with pytest.raises(ModelError, match="takes heads whose width is a multiple of 128"):
        fused_rnn(*args, cell=cells.gru, implementation="pallas_tpu")


def test_rwkv7_on_a_tpu_equals_the_definition():
    with jax.enable_x64(True):
        compare_low_rank(low_rank_tokens(1, 64, 64, 64, np.float64), interpret=True)


def test_rwkv7_reads_nothing_that_nobody_wrote():
    compare_low_rank(low_rank_tokens(1, 64, 64, 1, np.float32, T=24), BY_STEP)


def test_what_the_kernel_of_rwkv7_cannot_do_xla_does():
    args = low_rank_tokens(1, 8, 8, 8, np.float32, T=20)
    expected = low_rank(*args, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, low_rank(*args), expected)
    with pytest.raises(ModelError, match="takes keys and values of one dtype and of width 64"):
        low_rank(*args, implementation="pallas_tpu")


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
def test_in_a_train_step_on_a_mesh_of_tpus_all_passes_are_kernels():
    pattern = (slstm.Config(heads=2), rwkv7.Config(heads=2))
    model = lm.Config(vocab=128, d_model=256, pattern=pattern, ffn=None)
    data = Data(train=(Tokens(path="none"),), length=100, batch=4)
    config = Config(model=model, data=data, steps=2, mesh=Mesh(data=2, model=2))
    mesh = make_mesh(2, 1, 2, topology.parse("v5e:2x2").devices)
    schedule = programs.train(programs.for_accelerators(config), mesh).schedule
    assert schedule is not None
    kernels = {kernel.name.partition(".")[0] for kernel in schedule.kernels}
    families, passes = ("fused_rnn", "diagonal_plus_low_rank"), ("forward", "backward")
    assert kernels == {f"{family}_{each}" for family in families for each in passes}
