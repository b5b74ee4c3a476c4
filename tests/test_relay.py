"""Recurrences without a transition while time is split: exact, however rows and heads are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels.fused_rnn import cells, fused_rnn
from seqlab.parallel.mesh import use_mesh
from seqlab.parallel.relay import _pieces

T, d = 16, 2
CELLS = {"slstm": (cells.slstm, 4, 4), "gru": (cells.gru, 3, 1)}


@functools.cache
def inputs(name, B, H):
    _, gates, leaves = CELLS[name]
    r = np.random.default_rng(B + H)
    wx, R, bias = (r.normal(size=s) for s in [(B, T, H, gates, d), (H, d, gates, d), (H, gates, d)])
    state = tuple(np.abs(r.normal(size=(B, H, d))) for _ in range(leaves))
    return wx, r.random((B, T)) < 0.15, R, bias, state


def with_gradients(wx, reset, R, bias, state, cell):
    run = lambda wx, R, bias, state: fused_rnn(wx, reset, R, bias, state, cell=cell)
    results, pull = jax.vjp(run, wx, R, bias, state)
    return results, pull(jax.tree.map(jnp.cos, results))


@pytest.mark.parametrize(
    "name, B, H, axes",
    [
        ("slstm", 2, 4, {"seq": 8}),  # exchange: rows by 2, heads by 4
        ("slstm", 3, 1, {"seq": 4}),  # pipeline over rows
        ("gru", 1, 3, {"seq": 2}),  # pipeline over heads
        ("gru", 2, 4, {"data": 2, "seq": 2, "model": 2}),
        ("slstm", 2, 2, {"data": 2, "seq": 2, "model": 2}),  # pipeline of a single piece
    ],
)
def test_outputs_states_and_gradients_equal_one_device(name, B, H, axes):
    with jax.enable_x64(True):
        given, cell = inputs(name, B, H), CELLS[name][0]
        expected = jax.jit(functools.partial(with_gradients, cell=cell))(*given)
        with use_mesh(**axes):
            actual = jax.jit(lambda *a: with_gradients(*a, cell=cell))(*given)
        assert_close(actual[0], expected[0])
        assert_close(actual[1], expected[1], GRADIENT)


def test_pieces_are_as_many_as_devices_or_the_least_above():
    cut = {(8, 1, 4): (4, 1), (3, 1, 4): (3, 1), (1, 3, 8): (1, 3), (5, 1, 2): (5, 1)}
    assert {case: _pieces(*case) for case in cut} == cut


def test_an_exchange_does_the_work_once():
    """Each device runs its share of the rows: of the product with R, one row by one head."""
    wx, reset, R, bias, state = inputs("gru", 2, 4)
    with use_mesh(seq=8):
        run = jax.jit(lambda *a: fused_rnn(*a, cell=cells.gru)[0])
        program = run.lower(wx, reset, R, bias, state).compile()
    assert "all-to-all" in program.as_text()
    assert "collective-permute" not in program.as_text()
