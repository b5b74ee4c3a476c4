"""The chunked forms in XLA: windows of `windows`, each in the dual form of `dual`.

Kept for the backward pass is one state every 8 chunks; those between, and what a window computes,
are computed again. A window costs a pass of its keys through W_0 and W - W_0 and back, one of its
queries through W_0, W - W_0 and the momentum, and products of C x C a layer.
"""

import jax.numpy as jnp

from seqlab.kernels.precision import widen
from seqlab.kernels.test_time_memory import dual
from seqlab.kernels.test_time_memory.network import State
from seqlab.kernels.test_time_memory.windows import places, scan_windows


def with_momentum(
    q,
    k,
    v,
    rate,
    log_momentum,
    log_decay,
    reset,
    weights,
    state,
    *,
    chunk_size: int = 16,
    activation: str = "gelu",
    decay_to: str = "init",
    read: str = "token",
):
    """The arguments and results of `test_time_memory`."""
    options = dual.Options(activation, decay_to, read)
    gates = (rate, log_momentum, log_decay)
    run = dual.with_momentum
    return _scanned(run, options, (v, q, k), gates, reset, weights, state, chunk_size)


def within_chunks(q, k, v, rate, reset, weights, scale, state, *, activation: str = "gelu"):
    """The arguments and results of `test_time_training`."""
    run, options = dual.within_chunks, dual.Options(activation)
    weights, chunk_size = (weights, scale), scale.shape[-1]
    return _scanned(run, options, (v, q, k), (rate,), reset, weights, state, chunk_size)


def _scanned(run, options, tokens, gates, reset, weights, state: State, chunk_size: int):
    place = places(reset, state.phase[:, 0], chunk_size)
    tokens = (*tokens, jnp.stack([widen(gate) for gate in gates], -1))
    entering = state[:3] if state.start else state[:2]
    y, (W, S, *start) = scan_windows(
        run, options, tokens, reset, place, weights, entering, chunk_size=chunk_size
    )
    phase = jnp.broadcast_to((place[:, -1:] + 1) % chunk_size, state.phase.shape)
    return y.astype(tokens[0].dtype), State(W, S, start[0] if start else (), phase)
