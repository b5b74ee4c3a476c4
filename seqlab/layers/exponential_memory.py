"""The cell of the mLSTM (Beck et al., 2024): a matrix memory with exponential input gates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.maxplus_scan import stabilise
from seqlab.kernels.precision import widen


class State(NamedTuple):
    """C and its normaliser n, as [C, n] e^-m, and m."""

    memory: jax.Array  # [B, H, K, V + 1]
    m: jax.Array  # [B, H]


def empty(batch: int, heads: int, K: int, V: int) -> State:
    """The state before a document; its m is 0."""
    memory = jnp.zeros((batch, heads, K, V + 1), jnp.float32)
    return State(memory, jnp.zeros((batch, heads), jnp.float32))


def exponential_memory(q, k, v, log_input, log_forget, reset, state: State, *, eps, **options):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t

    h_t = C_t^T q_t / (max(|n_t . q_t|, 1) + eps), with eps, like C and n, in units of e^m_t.

    q, k                   [B, T, H, K]; queries are multiplied by K ** -0.5 here
    v                      [B, T, H, V]
    log_input, log_forget  [B, T, H] log i, of any size, and log f <= 0, in float32
    reset                  [B, T] bool, true where a document starts

    Returns h [B, T, H, V] in the dtype of v, and the state. `options` are those of
    `decayed_outer_product`. All is kept in units of e^m, m_t = max(log f_t + m_{t-1}, log i_t), so
    no exponential overflows.
    """
    gates, m = stabilise(log_forget, log_input, reset, state.m)
    (y, total), memory = decayed_outer_product(
        q * q.shape[-1] ** -0.5,
        (widen(k) * jnp.exp(gates.log_input)[..., None]).astype(k.dtype),
        v,
        gates.log_decay[..., None],
        reset,
        state.memory,
        normaliser=True,
        **options,
    )
    total = jnp.maximum(jnp.abs(total), jnp.exp(-gates.m)) + eps
    return (widen(y) / total[..., None]).astype(v.dtype), State(memory, m.astype(state.m.dtype))
