"""All the states that a sequence of transitions leads through (see `parallel.transitions`).

For recurrences whose state is as small as a token: whoever has more keeps to `chunk_scan`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.chunk_scan import cut


def one_by_one(tokens, state):
    """T steps, that read and write every number once: on a CPU the fastest for large states.

    tokens  transitions, leaves [B, T, ...]
    state   [B, ...], the state before the first

    Returns the state after each token, [B, T, ...].
    """

    def step(state, token):
        state = token(state)
        return state, state

    _, states = lax.scan(step, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), states)


def side_by_side(tokens, nothing, state):
    """The same in 2 sqrt(T) steps, for accelerators: all chunks at once, then from one to the next.

    nothing  the transition that changes nothing, leaves [B, ...]
    """
    T = jax.tree.leaves(tokens)[0].shape[1]
    chunks = cut(tokens, math.isqrt(T))  # [N, B, C, ...]
    count = jax.tree.leaves(chunks)[0].shape[0]
    start = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), nothing)

    def step(before, token):
        after = before.then(token)
        return after, after

    whole, upto = lax.scan(step, start, jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), chunks))
    _, entering = lax.scan(lambda state, chunk: (chunk(state), state), state, whole)
    joined = lambda a: jnp.moveaxis(a, (2, 1), (0, 1)).reshape(a.shape[2], -1, *a.shape[3:])
    return jax.tree.map(lambda a: joined(a)[:, :T], upto(entering))  # from [C, N, B, ...]
