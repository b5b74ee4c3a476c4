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
from seqlab.kernels.fused_rnn import cells, fused_rnn, layout_tpu
from seqlab.kernels.fused_rnn import pallas_tpu as fused_rnn_tpu
from seqlab.layers.mixers import slstm
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


def values_and_gradients(run, wx, reset, R, bias, state):
    """Results of `run` and what a fixed cotangent of them gives, of all arguments but reset."""

    @jax.jit
    def both(*floats):
        out, pull = jax.vjp(lambda wx, R, bias, state: run(wx, reset, R, bias, state), *floats)
        weights = lambda a: jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
        return out, pull(jax.tree.map(lambda a: weights(a).astype(a.dtype), out))

    return both(wx, R, bias, state)


def compare_rnn(cell, args, interpret, expected="reference"):
    kernel = functools.partial(fused_rnn_tpu.scanned, cell=cell, interpret=interpret)
    known = functools.partial(fused_rnn, cell=cell, implementation=expected)
    actual, expected = (values_and_gradients(run, *args) for run in (kernel, known))
    dtypes = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]
    assert dtypes(actual) == dtypes(expected)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)


@pytest.mark.parametrize(
    "cell, H, d",
    [
        (cells.slstm, 2, 64),  # two a step, so that a row is full
        (cells.lstm, 1, 128),
        (cells.gru, 2, 128),
        (cells.elman, 1, 128),
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
    args = rnn_tokens(cells.gru, 1, 20, 1, 128, jnp.bfloat16)
    compare_rnn(cells.gru, args, interpret=True, expected="xla")


def test_what_the_kernel_of_cells_cannot_do_xla_does():
    args = rnn_tokens(cells.gru, 1, 5, 2, 8, np.float32)
    expected = fused_rnn(*args, cell=cells.gru, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, fused_rnn(*args, cell=cells.gru), expected)
    with pytest.raises(ModelError, match="takes heads whose width is a multiple of 128"):
        fused_rnn(*args, cell=cells.gru, implementation="pallas_tpu")


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
@pytest.mark.parametrize(
    "name, mixer",
    [("fused_rnn", slstm.Config(heads=2))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_in_a_train_step_on_a_mesh_of_tpus_both_passes_are_kernels(name, mixer):
    model = lm.Config(vocab=128, d_model=256, pattern=(mixer,), ffn=None)
    data = Data(train=(Tokens(path="none"),), length=100, batch=4)
    config = Config(model=model, data=data, steps=2, mesh=Mesh(data=2, model=2))
    mesh = make_mesh(2, 1, 2, topology.parse("v5e:2x2").devices)
    schedule = programs.train(programs.for_accelerators(config), mesh).schedule
    assert schedule is not None
    found = {kernel.name.partition(".")[0] for kernel in schedule.kernels}
    assert found == {f"{name}_forward", f"{name}_backward"}
