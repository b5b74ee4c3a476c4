"""One chunk of the selective scan for accelerators, where steps are dear and memory is fast.

The same arguments, results and equations as `token_by_token`, with decays and states of the whole
chunk [B, C, N, E] at once.
"""

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import widen
from seqlab.kernels.transition_scan import side_by_side
from seqlab.parallel.transitions import Diagonal


def forward(u, dt, b, c, reset, A, h):
    decay, write = _tokens(u, dt, b, reset, A)
    states = _scan(decay, write, h)
    return jnp.einsum("bcne,bcn->bce", states, widen(c)), states[:, -1]


def backward(u, dt, b, c, reset, A, h, dy, D):
    u, dt, b, c, dy = map(widen, (u, dt, b, c, dy))
    decay, write = _tokens(u, dt, b, reset, A)
    states = _scan(decay, write, h)
    kept = decay * jnp.concatenate([h[:, None], states[:, :-1]], 1)
    # lambda, of the last token first; D reaches the last state undecayed
    later = jnp.flip(jnp.concatenate([decay[:, 1:], jnp.ones_like(decay[:, :1])], 1), 1)
    read = jnp.flip(c[..., None] * dy[:, :, None], 1)
    lamb = jnp.flip(_scan(later, read, D), 1)
    through = lamb * kept
    by_b = jnp.einsum("bcne,bcn->bce", lamb, b)
    return (
        by_b * dt,
        jnp.einsum("bcne,ne->bce", through, A) + by_b * u,
        jnp.einsum("bcne,bce->bcn", lamb, dt * u),
        jnp.einsum("bcne,bce->bcn", states, dy),
        None,
        jnp.einsum("bcne,bce->ne", through, dt),
        decay[:, 0] * lamb[:, 0],
    )


def _tokens(u, dt, b, reset, A):
    """Every token's decay and write, [B, C, N, E]."""
    exponent = jnp.where(reset[..., None, None], -jnp.inf, widen(dt)[:, :, None] * A)
    return jnp.exp(exponent), (widen(dt) * widen(u))[:, :, None] * widen(b)[..., None]


def _scan(decay, write, h) -> jax.Array:
    nothing = Diagonal(jnp.ones_like(h), jnp.zeros_like(h))
    return side_by_side(Diagonal(decay, write), nothing, h)
