"""Memories that are networks, trained on the tokens of a document while it is read.

`test_time_memory` is the long-term memory of Titans (Behrouz, Zhong & Mirrokni, 2024), with
momentum and decay; `test_time_training` is that of TTT-Linear and TTT-MLP (Sun et al., 2024). Both
are a recurrence whose state is the weights of a network, and in both the gradients of a chunk's
tokens are taken at the weights with which the chunk began, so that chunks run in parallel inside.
Chunks are counted from the first token of a document: what is packed before it, or how its tokens
are fed, changes nothing.

Weights depend on earlier ones through gradients of a network, which no transition describes (that
of a single layer would be a matrix of d_in^2 numbers for every head; it is not used). Where a mesh
splits time, rows and heads are relayed (`parallel.relay`): T tokens take T steps in sequence,
whatever the devices, each with its share of rows and heads.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence
from seqlab.kernels.test_time_memory import xla
from seqlab.kernels.test_time_memory.network import State, Weights, empty, network

__all__ = ["State", "Weights", "empty", "test_time_memory", "test_time_training"]


@recurrence(xla=xla.with_momentum, weights=1)
def test_time_memory(
    q,
    k,
    v,
    rate,
    log_momentum,
    log_decay,
    reset,
    weights: Weights,
    state: State,
    *,
    chunk_size: int = 16,
    activation: str = "gelu",
    decay_to: str = "init",
    read: str = "token",
):
    """S_t = exp(log_momentum_t) S_{t-1} - rate_t grad |f_{W'}(k_t) - v_t|^2
    W_t = exp(log_decay_t) W_{t-1} + S_t;  y_t = f_{W_t}(q_t)

    where W' are the weights before the first token of t's chunk (Behrouz et al., 2024, eq. 8 to 18;
    chunks: section 3.2). With decay_to="init" it is W - W_0 that decays, not W: memories of several
    layers that decay to zero never come back from there, since at zero all gradients are zero.

    q, k          [B, T, H, K]
    v             [B, T, H, V]
    rate          [B, T, H] >= 0. How large it can be without W growing beyond all bounds depends on
                  the chunk and the momentum: for keys and values of length 1, 0.1 with chunks of 16
                  and 0.03 with 64 or a momentum of 0.5, 0.01 with one of 0.9
    log_momentum  [B, T, H] <= 0
    log_decay     [B, T, H] <= 0
    reset         [B, T] bool, true where a new document starts, with W_0 and no momentum
    weights       W_0, and a norm if f has one
    state         see `State`
    chunk_size    tokens whose gradients are taken at the same weights; it changes results
    activation    "gelu" (of tanh) or "silu"
    read          "token", or "chunk": y_t = f_{W'}(q_t), which is cheaper

    Returns y [B, T, H, V] in the dtype of v, and the state after the last token.
    """

    def step(state, token):
        q, k, v, rate, log_momentum, log_decay, reset = token
        W, S, start, phase = _forget(state, reset)
        start = _at_border(phase, W, start)
        gradient = _gradient(weights, start, k, v, activation)
        move = lambda S, g: _each(jnp.exp(log_momentum)) * S - 2 * _each(rate) * g
        S = jax.tree.map(move, S, gradient)
        W = jax.tree.map(lambda W, S: _each(jnp.exp(log_decay)) * W + S, W, S)
        if decay_to == "zero":
            shrink = lambda W, W_0: W + _each(jnp.expm1(log_decay)) * W_0
            W = jax.tree.map(shrink, W, weights.layers)
        y = _read(weights, W if read == "token" else start, q, activation)
        return State(W, S, start, (phase + 1) % chunk_size), y

    return _stepped(step, (q, k, v, rate, log_momentum, log_decay, reset), state)


@recurrence(xla=xla.within_chunks, weights=2)
def test_time_training(
    q, k, v, rate, reset, weights: Weights, scale, state: State, *, activation: str = "gelu"
):
    """W_t = W' - scale_i sum_{j <= t} rate_j grad 1/2 |f_{W'}(k_j) - v_j|^2;  y_t = f_{W_t}(q_t)

    where W' are the weights before the first token of t's chunk, i is t's place in it, and j runs
    over its tokens (Sun et al., 2024, section 2.4, with the rates of their code).

    q, k     [B, T, H, K]
    v        [B, T, H, V]; the paper's target is v - k, for f(x) = x + norm(W x)
    rate     [B, T, H] >= 0
    reset    [B, T] bool, true where a new document starts, with W_0
    weights  W_0, and a norm if f has one
    scale    [H, C], or [1, C] for all heads; chunks have C tokens
    state    see `State`

    Returns y [B, T, H, V] in the dtype of v, and the state after the last token.
    """
    chunk_size = scale.shape[-1]

    def step(state, token):
        q, k, v, rate, reset = token
        W, S, _, phase = _forget(state, reset)
        W = _at_border(phase, jax.tree.map(lambda W, S: W + _each(scale[:, -1]) * S, W, S), W)
        S = _at_border(phase, jax.tree.map(jnp.zeros_like, S), S)
        gradient = _gradient(weights, W, k, v, activation)
        S = jax.tree.map(lambda S, g: S - _each(rate) * g, S, gradient)
        here = _each(jnp.take_along_axis(scale, phase.T, 1).T)  # [B, H, 1, 1]
        now = jax.tree.map(lambda W, S: W + here * S, W, S)
        return State(W, S, (), (phase + 1) % chunk_size), _read(weights, now, q, activation)

    return _stepped(step, (q, k, v, rate, reset), state)


def _stepped(step, tokens, state):
    """Token by token; the arrays of a token and of the state in float32 or wider."""
    wide = lambda a: widen(a) if jnp.issubdtype(a.dtype, jnp.floating) else a
    last, y = lax.scan(step, state, tuple(jnp.moveaxis(wide(a), 1, 0) for a in tokens))
    return jnp.moveaxis(y, 0, 1).astype(tokens[2].dtype), last


def _forget(state, reset):
    over = lambda a: reset.reshape(-1, *(1,) * (a.ndim - 1))
    return jax.tree.map(lambda a: jnp.where(over(a), 0, a), state)


def _at_border(phase, new: tuple, old: tuple) -> tuple:
    return jax.tree.map(lambda a, b: jnp.where(_each(phase) == 0, a, b), new, old)


def _each(gate):
    """A number for every head, beside its matrices."""
    return gate[..., None, None]


def _gradient(weights: Weights, W: tuple, k, v, activation: str) -> tuple:
    """Of 1/2 |f(k) - v|^2, in W - W_0."""
    error = lambda W: _read(weights, W, k, activation) - v
    return jax.grad(lambda W: jnp.sum(jnp.square(error(W))) / 2)(W)


def _read(weights: Weights, W: tuple, x, activation: str):
    """f(x) [B, H, V] for x [B, H, K], with the weights W_0 + W."""
    product = lambda layer, h: h @ (weights.layers[layer] + W[layer])
    return network(x[:, :, None], product, weights, activation)[:, :, 0]
