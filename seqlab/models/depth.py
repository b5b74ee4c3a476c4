"""A model whose blocks lie one by one, for programs that run each of them many times.

A scan over depth slices the weights and states of a period out of their stacks. Where XLA makes
copies of the slices, as on CPUs, a step of one token costs several times what it reads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.layers.mixer import State
from seqlab.models.lm import LM


def unstacked(model: LM, state: State) -> tuple[LM, State]:
    """The same model, all periods but the last among its blocks `before`, and its state."""
    n, m, repeats = len(model.before), len(model.blocks), model.config.repeats
    flat: LM = jax.tree.map(lambda a: a, model)
    take = lambda tree, at: jax.tree.map(lambda a: a[at], tree)
    early = [take(model.blocks[j], r) for r in range(repeats - 1) for j in range(m)]
    flat.before = nnx.List([*model.before, *early])
    flat.blocks = take(model.blocks, slice(-1, None))
    before, middle, after = state[:n], state[n : n + m], state[n + m :]
    periods = [take(s, slice(r, r + 1)) for r in range(repeats) for s in middle]
    return flat, (*before, *periods, *after)


def stacked(model: LM, state: State) -> State:
    """What `model` calls the state of its unstacked self."""
    n, m, repeats = len(model.before), len(model.blocks), model.config.repeats
    end = n + m * repeats
    join = lambda *leaves: jnp.concatenate(leaves)
    middle = [jax.tree.map(join, *state[n + j : end : m]) for j in range(m)]
    return (*state[:n], *middle, *state[end:])
