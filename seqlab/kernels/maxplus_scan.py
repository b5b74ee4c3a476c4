"""The running maximum that keeps exponential gates in range (Beck et al., 2024, equation 15)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.precision import widen
from seqlab.kernels.recurrence import recurrence
from seqlab.kernels.transition_scan import side_by_side
from seqlab.parallel.transitions import MaxPlus


def _scanned(log_decay, log_input, reset, state, *, initial: float = 0.0):
    """The definition's arguments and results, in far fewer steps than tokens."""
    tokens = _tokens(log_decay, log_input, reset, initial)
    nothing = MaxPlus(jnp.zeros_like(state), jnp.full_like(state, -jnp.inf))
    m = side_by_side(tokens, nothing, lax.stop_gradient(state))
    return m, m[:, -1]


def _transition(log_decay, log_input, reset, *, initial: float = 0.0) -> MaxPlus:
    """What these tokens do to the m [B, H] that enters them."""
    tokens = _tokens(log_decay, log_input, reset, initial)
    empty = jnp.full_like(tokens.floor[:, 0], -jnp.inf)
    nothing = MaxPlus(jnp.zeros_like(empty), empty)
    return MaxPlus(jnp.sum(tokens.shift, 1), side_by_side(tokens, nothing, empty)[:, -1])


def _tokens(log_decay, log_input, reset, initial) -> MaxPlus:
    """Each token's transition, [B, T, H]."""
    log_decay, log_input = (widen(lax.stop_gradient(a)) for a in (log_decay, log_input))
    first = reset[..., None]
    floor = jnp.where(first, jnp.maximum(log_decay + initial, log_input), log_input)
    return MaxPlus(jnp.where(first, -jnp.inf, log_decay), floor)


@recurrence(xla=_scanned, transition=_transition)
def maxplus_scan(log_decay, log_input, reset, state, *, initial: float = 0.0):
    """m_t = max(log_decay_t + m_{t-1}, log_input_t);  m_{t-1} = initial where reset_t.

    log_decay, log_input  [B, T, H]
    reset                 [B, T] bool, true where a new document starts
    state                 [B, H] float32, the m before the first token
    initial               the m with which documents start; with -inf the first m is log_input

    Returns m [B, T, H] in float32 and the last of them. No gradient passes: m is only the unit in
    which sums of exponentials are kept, and what is read from them does not depend on it.
    """

    def step(m, token):
        log_decay, log_input, reset = token
        m = jnp.maximum(log_decay + jnp.where(reset[:, None], initial, m), log_input)
        return m, m

    log_decay, log_input, state = lax.stop_gradient((widen(log_decay), widen(log_input), state))
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (log_decay, log_input, reset))
    last, m = lax.scan(step, state, tokens)
    return jnp.moveaxis(m, 0, 1), last


class Stabilised(NamedTuple):
    """Exponential gates in units of e^m, all [B, T, H] in float32.

    S_t = e^a_t S_{t-1} + e^i_t u_t, kept as Z_t = S_t e^-m_t, is
    Z_t = e^log_decay_t Z_{t-1} + e^log_input_t u_t with both exponents <= 0.
    """

    log_decay: jax.Array  # 0 where nothing has been written yet: Z_{t-1} is zero there
    log_input: jax.Array
    m: jax.Array


def stabilise(log_decay, log_input, reset, state, *, initial: float = 0.0):
    """Stabilised gates, and the last m, to be carried with Z; arguments as for `maxplus_scan`.

    Gradients reach the gates as if m were constant. That is exact for whatever does not depend on
    the unit, such as a quotient of two such sums.
    """
    m, last = maxplus_scan(log_decay, log_input, reset, state, initial=initial)
    before = jnp.concatenate([lax.stop_gradient(state)[:, None].astype(m.dtype), m[:, :-1]], 1)
    empty = reset[..., None] | jnp.isneginf(before)
    unit = jnp.where(jnp.isneginf(m), 0, m)
    kept = jnp.where(empty, 0, widen(log_decay) + jnp.where(empty, 0, before) - unit)
    # m of log T passes may lie a rounding below log_decay + before
    kept -= lax.stop_gradient(jnp.maximum(kept, 0))
    return Stabilised(kept, widen(log_input) - unit, m), last
