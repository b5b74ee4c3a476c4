"""One step of each cell: what the token and the last hidden vector say to the gates -> the state.

A cell is f(wx, rh, state) -> state, elementwise, where wx and rh have an array [..., d] for each of
its G gates and the state has several, of which the first is the hidden vector h. Gates come in the
order in which each docstring names them; "a" stands for wx_a + rh_a. The empty state is zero
everywhere.
"""

from operator import add

import jax
import jax.numpy as jnp


def advance(cell, wx, rh, state):
    """The state after a token, in the dtypes of the one before it; wx and rh [..., G, d]."""
    gates = lambda a: tuple(a[..., gate, :] for gate in range(a.shape[-2]))
    return stepped(cell, gates(wx), gates(rh), state)


def stepped(cell, wx, rh, state):
    """The same of gates apart."""
    after = cell(wx, rh, state)
    return tuple(new.astype(old.dtype) for new, old in zip(after, state, strict=True))


def elman(wx, rh, state):
    """h = tanh(a) (Elman, 1990)"""
    del state
    (a,) = map(add, wx, rh)
    return (jnp.tanh(a),)


def gru(wx, rh, state):
    """h = (1 - z) tanh(wx_n + r rh_n) + z h,  r, z, n; r and z after sigmoid (Cho et al., 2014)

    The reset gate is applied after the product with R, so that one product serves all gates.
    """
    r, z = map(jax.nn.sigmoid, map(add, wx[:2], rh[:2]))
    n = jnp.tanh(wx[2] + r * rh[2])
    return (n + z * (state[0] - n),)


def lstm(wx, rh, state):
    """c = f c + i tanh(z),  h = o tanh(c);  i, f, z, o, all but z after sigmoid

    (Hochreiter & Schmidhuber, 1997; the forget gate: Gers et al., 2000)
    """
    i, f, z, o = map(add, wx, rh)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(z)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def slstm(wx, rh, state):
    """c = f c + i tanh(z),  n = f n + i,  h = sigmoid(o) c / n;  i, f, z, o; state h, c, n, m

    with i after exp and f after sigmoid (Beck et al., 2024, eq. 8 to 17). Both c and n are carried
    divided by e^m, m the largest exponent in them: i stands for e^(i - m), f for
    sigmoid(f) e^(m_before - m). While n is 0 there is nothing in them, and m is i alone.
    """
    _, c, n, m = state
    i, f, z, o = map(add, wx, rh)
    kept = jax.nn.log_sigmoid(f) + m
    m = jnp.where(n == 0, i, jnp.maximum(i, kept))
    i, f = jnp.exp(i - m), jnp.exp(jnp.minimum(kept - m, 0))  # kept > m only where n is 0
    c, n = f * c + i * jnp.tanh(z), f * n + i
    return jax.nn.sigmoid(o) * c / n, c, n, m
