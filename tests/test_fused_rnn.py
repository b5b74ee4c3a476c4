"""The fused recurrent networks agree with their definition, with torch, and shard exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels.fused_rnn import cells, fused_rnn
from seqlab.parallel.mesh import use_mesh

B, H, D = 2, 2, 8
#: Gates and arrays of the state of each cell.
SIZES = {cells.elman: (1, 1), cells.gru: (3, 1), cells.lstm: (4, 2), cells.slstm: (4, 4)}
CELLS = pytest.mark.parametrize("cell", SIZES, ids=lambda cell: cell.__name__)


def arguments(cell, T, *, scale=1.0, dtype=np.float64):
    """wx, reset, R, bias, state: a state that some tokens have left."""
    gates, leaves = SIZES[cell]
    rng = np.random.default_rng(T)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    state = [normal(B, H, D) for _ in range(leaves)]
    if cell is cells.slstm:
        state[2] = np.abs(state[2]) + 1
    reset = rng.random((B, T)) < 0.1
    reset[:, 0] = False
    R, bias = normal(H, D, gates, D) * D**-0.5, normal(H, gates, D)
    return scale * normal(B, T, H, gates, D), reset, R, bias, tuple(state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(cell, implementation, wx, reset, R, bias, state):
    def loss(wx, R, bias, state):
        y, last = fused_rnn(wx, reset, R, bias, state, cell=cell, implementation=implementation)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(a)) for a in last), (y, last)

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(wx, R, bias, state)
    return out, gradients


def both_agree(cell, arguments):
    with jax.enable_x64(arguments[0].dtype == np.float64):
        expected, gradients = value_and_gradients(cell, "reference", *arguments)
        actual, actual_gradients = value_and_gradients(cell, "xla", *arguments)
        assert_close(actual, expected)
        assert_close(actual_gradients, gradients, GRADIENT)
        assert actual[0].dtype == arguments[0].dtype
    return actual, actual_gradients


@CELLS
def test_the_hand_written_backward_equals_autodiff_of_the_definition(cell):
    both_agree(cell, arguments(cell, 13))


@CELLS
@pytest.mark.parametrize("scale", [1e-6, 80.0])
def test_gates_at_their_extremes_are_exact_and_finite(cell, scale):
    out = both_agree(cell, arguments(cell, 13, scale=scale))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(out))


def test_exponential_gates_may_alternate_between_open_and_shut():
    wx, reset, R, bias, state = arguments(cells.slstm, 13)
    wx[..., 0, :] = np.where(np.arange(13) % 2, 30.0, -30.0)[None, :, None, None]
    both_agree(cells.slstm, (wx, reset, R, bias, state))


@CELLS
def test_the_first_token_of_all_starts_from_nothing(cell):
    wx, reset, R, bias, state = arguments(cell, 13)
    reset[:, 0] = True
    empty = tuple(np.zeros_like(a) for a in state)
    (y, _), gradients = both_agree(cell, (wx, reset, R, bias, state))
    (expected, _), _ = both_agree(cell, (wx, reset, R, bias, empty))
    np.testing.assert_array_equal(y, expected)
    assert not any(np.any(d) for d in gradients[3])


@CELLS
def test_devices_along_time_and_heads_equal_one(cell):
    args = arguments(cell, 12, dtype=np.float32)
    expected, gradients = value_and_gradients(cell, "xla", *args)
    with use_mesh(data=2, seq=2, model=2):
        sharded = jax.jit(value_and_gradients.__wrapped__, static_argnums=(0, 1))
        actual, actual_gradients = sharded(cell, "xla", *args)
    assert_close(actual, expected)
    assert_close(actual_gradients, gradients, GRADIENT)


def test_narrow_operands_keep_wide_states():
    wx, reset, R, bias, state = arguments(cells.lstm, 13, dtype=np.float32)
    wx, R = wx.astype(jnp.bfloat16), R.astype(jnp.bfloat16)
    (y, last), gradients = value_and_gradients(cells.lstm, "xla", wx, reset, R, bias, state)
    assert (y.dtype, last[1].dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in gradients[:3]] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    wx, R = wx.astype(np.float32), R.astype(np.float32)
    (wide, _), _ = value_and_gradients(cells.lstm, "xla", wx, reset, R, bias, state)
    assert_close(y, wide)


@pytest.mark.parametrize(
    "name, cell", [("RNN", cells.elman), ("GRU", cells.gru), ("LSTM", cells.lstm)]
)
def test_one_head_is_the_layer_of_torch(name, cell):
    torch = pytest.importorskip("torch")
    gates, leaves = SIZES[cell]
    layer = getattr(torch.nn, name)(5, D, batch_first=True)
    x = np.random.default_rng(0).normal(size=(B, 13, 5)).astype(np.float32)
    with torch.no_grad():
        expected, _ = layer(torch.from_numpy(x))
    w, r, bw, br = (a.detach().numpy() for a in layer.parameters())
    wx = (x @ w.T + bw).reshape(B, 13, 1, gates, D)
    R, bias = r.reshape(1, gates, D, D).transpose(0, 3, 1, 2), br.reshape(1, gates, D)
    state = (np.zeros((B, 1, D), np.float32),) * leaves
    y, _ = fused_rnn(wx, np.zeros((B, 13), bool), R, bias, state, cell=cell)
    assert_close(y[:, :, 0], expected.numpy())


def test_exponential_gates_equal_sums_without_a_stabiliser():
    wx, reset, R, bias, state = arguments(cells.slstm, 13)
    empty, reset = tuple(np.zeros_like(a) for a in state), np.zeros_like(reset)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    h, c, n, expected = *empty[:3], []
    for t in range(13):
        raw = wx[:, t] + np.einsum("bhd,hdge->bhge", h, R) + bias
        i, f, z, o = np.moveaxis(raw, 2, 0)
        c, n = sigmoid(f) * c + np.exp(i) * np.tanh(z), sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        expected.append(h)
    with jax.enable_x64(True):
        y, _ = fused_rnn(wx, reset, R, bias, empty, cell=cells.slstm)
        assert_close(y, np.stack(expected, 1))
