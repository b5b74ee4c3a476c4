"""Carry a state across devices when time is sharded over the mesh axis `seq`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqlab.parallel.mesh import DATA, MODEL, SEQ

State = Any


def enter(transition: Callable, state: State, strategy: str) -> tuple[State, State]:
    """Inside a shard: the state entering this shard, and the one leaving the last shard.

    transition  what this shard's tokens do to a state (see `parallel.transitions`)
    state       the state before the whole sequence, the same on every shard
    strategy    all_gather (LASP-2, Sun et al., 2025: one collective, then every device folds the
                transitions before it) or ring (LASP-1, Sun et al., 2024: device after device)
    """
    return {"all_gather": _all_gather, "ring": _ring}[strategy](transition, state)


def _all_gather(transition, state):
    everyone = lax.all_gather(transition, SEQ)
    last, entering = lax.scan(lambda s, t: (t(s), s), _over_shards(state), everyone)
    mine = jax.tree.map(lambda e: e[lax.axis_index(SEQ)], entering)
    return mine, _from(lax.axis_size(SEQ) - 1, last)


def _ring(transition, state):
    size, me = lax.axis_size(SEQ), lax.axis_index(SEQ)
    entering = _over_shards(state)
    for hop in range(1, size):
        sent = lax.ppermute(transition(entering), SEQ, [(i, i + 1) for i in range(size - 1)])
        entering = jax.tree.map(lambda new, old: jnp.where(me == hop, new, old), sent, entering)
    return entering, _from(size - 1, transition(entering))


def on_mesh(whole: Callable, shard: Callable, tokens: tuple, state: State, weights: tuple = ()):
    """Run f(*tokens, *weights, state) -> (y, state) by hand over the ambient mesh, if there is one.

    Tokens are [B, T, heads, ...], weights [heads, ...] and the state is [B, heads, ...]. An axis
    that does not divide evenly stays whole; tokens with a single head are shared by all heads, if
    there are several.
    `shard` runs where time is split, `whole` where it is not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return whole(*tokens, *weights, state)

    def split(axis: str, dim: int, shared: tuple[int, ...] = ()):
        sizes = {a.shape[dim] for a in jax.tree.leaves(tokens) if a.ndim > dim}
        whole = {size for size in sizes if size % mesh.shape[axis]}
        return axis if whole <= set(shared) and whole < sizes and mesh.shape[axis] > 1 else None

    batch, time, heads = split(DATA, 0), split(SEQ, 1), split(MODEL, 2, shared=(1,))

    def of_token(a):
        alone = a.ndim > 2 and a.shape[2] == 1
        return P(*(batch, time, None if alone else heads)[: a.ndim])

    of_tokens = jax.tree.map(of_token, tokens)
    of_state = jax.tree.map(lambda a: P(*(batch, heads)[: a.ndim]), state)
    of_weights = jax.tree.map(lambda a: P(heads if a.shape[0] > 1 else None), weights)
    run = whole if time is None else shard
    used = [axis for axis in (batch, time, heads) if axis]

    def local(tokens, weights, state):
        # what several shards share enters as copies, so that the gradients of all are summed
        copies = lambda a, spec: _varying(a, *(x for x in used if x not in spec))
        tokens = jax.tree.map(copies, tokens, of_tokens)
        weights = jax.tree.map(copies, weights, of_weights)
        state = jax.tree.map(lambda a, spec: copies(a, (*spec, SEQ)), state, of_state)
        return run(*tokens, *weights, state)

    specs = (of_tokens, of_weights, of_state)
    lifted = jax.shard_map(local, in_specs=specs, out_specs=(P(batch, time, heads), of_state))
    return lifted(tokens, weights, state)


def _from(shard: int, tree):
    mine = lax.axis_index(SEQ) == shard
    return jax.tree.map(lambda a: lax.psum(jnp.where(mine, a, jnp.zeros_like(a)), SEQ), tree)


def _over_shards(state):
    return jax.tree.map(lambda a: _varying(a, SEQ), state)


def _varying(a: jax.Array, *axes: str) -> jax.Array:
    """The same values, typed as differing along these mesh axes."""
    return lax.pcast(a, axes, to="varying") if axes else a
