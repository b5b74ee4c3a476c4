"""Carry a state across devices when time is sharded over the mesh axis `seq`."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqlab.parallel import cost
from seqlab.parallel.lines import Lines, as_one, size_of
from seqlab.parallel.mesh import DATA, MODEL, SEQ, Travel
from seqlab.parallel.strategies import (
    all_gather,
    all_scan,
    all_scan_hops,
    blocks_for,
    doubling,
    ring,
    window,
)
from seqlab.parallel.two_level import two_level

State = Any

#: The name of the state that enters a shard, for policies of `jax.checkpoint`: saving it is cheaper
#: than having it travel again.
ENTERING = "entering"

_UNEVEN = (
    "{} tokens do not divide evenly over the {} devices of the mesh axis seq: the last {} run on "
    "all of them; a length of {} or {} is faster."
)

_STRATEGIES = {
    "all_gather": all_gather,
    "ring": ring,
    "all_scan": all_scan,
    "doubling": doubling,
    "window": window,
    "two_level": two_level,
}


class Work(Protocol):
    """What a device does while states travel, a loop each way: hashable. Both call `scan` once, as
    `lax.scan` is called, for a step beside each hop.

    forward   scan, *operands -> results, what the backward pass needs
    backward  scan, that, cotangents of the results -> those of the operands (None for bool)
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., tuple[Any, ...]]


def enter(transition: Any, state: State, travel: Travel) -> tuple[State, State]:
    """Inside a shard: the state entering this shard, and the one leaving the last shard.

    transition  what this shard's tokens do to a state (see `parallel.transitions`)
    state       the state before the whole sequence, the same on every shard
    travel      the strategy (see `parallel.strategies`) and its options

    Numbers travel and are folded in float32, or wider if any of them is. The backward pass is the
    same strategy walked against time, with the transition turned; it keeps the state that enters
    and the transition without its update. A final state that nobody uses costs nothing.
    """
    return enter_beside(transition, state, travel, None, ())[:2]


def enter_beside(
    transition: Any, state: State, travel: Travel, work: Work | None, operands: tuple
) -> tuple[State, State, Any]:
    """The same, and the results of work that is done while states travel.

    `hops` says how many steps it must have; cotangents travel beside its backward pass.
    """
    given, (transition, state) = state, _widened((transition, state))
    transition = jax.tree.map(lambda a: _varying(a, SEQ), transition)
    travel = _decided(transition, state, travel)
    if hasattr(transition, "turned"):
        results: Any = _enter(travel, False, work, transition, state, operands)
    else:
        results = _carried(travel, False, *lax.stop_gradient((transition, state)))
    as_given = lambda tree: jax.tree.map(lambda a, s: a.astype(s.dtype), tree, given)
    return as_given(results[0]), as_given(results[1]), results[2]


def hops(transition: Any, state: State, travel: Travel) -> int | None:
    """How many steps of work can go beside the travel of a state; None where none can.

    Only `all_scan` has small hops, one after the other, that a loop of work can hide.
    """
    transition, state = _widened((transition, state))
    devices = lax.axis_size(SEQ)
    if _decided(transition, state, travel).strategy != "all_scan":
        return None
    return devices - 2 + blocks_for(transition, state, devices, travel.blocks).count


def _widened(tree):
    """In float32, or the widest of its types if that is wider."""
    wide = jnp.result_type(jnp.float32, *(a.dtype for a in jax.tree.leaves(tree)))
    return jax.tree.map(lambda a: a.astype(wide), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _enter(travel: Travel, against_time: bool, work, transition, state, operands):
    return _forward(travel, against_time, work, transition, state, operands)[0]


def _forward(travel, against_time, work, transition, state, operands):
    forward = work and (lambda scan: work.forward(scan, *operands))
    entering, leaving, (results, kept) = _carried(travel, against_time, transition, state, forward)
    entering = jax.tree.map(lambda a: checkpoint_name(a, ENTERING), entering)
    saved = transition._replace(update=None), entering, kept
    return (entering, leaving, results), saved


def _backward(travel, against_time, work, saved, cotangents):
    """The cotangent of the final state enters at the end; that of the initial state leaves."""
    transition, entering, kept = saved
    d_entering, d_leaving, d_results = cotangents
    turned: Any = transition.turned(d_entering)
    if work is None:
        back: Any = _enter(travel, not against_time, None, turned, d_leaving, ())  # pyright: ignore
        d_left, d_state, d_operands = *back[:2], ()
    else:
        backward = lambda scan: work.backward(scan, kept, d_results)
        d_left, d_state, d_operands = _carried(
            travel, not against_time, turned, d_leaving, backward
        )
    # of the update only the shape matters here
    _, pullback = jax.vjp(lambda t: t(entering), transition._replace(update=d_left))
    return *pullback(d_left), d_state, d_operands


_enter.defvjp(_forward, _backward)


def _carried(travel: Travel, against_time: bool, transition, state, work: Any = None) -> Any:
    """What enters and what leaves, and what work(scan) returns."""
    devices = range(lax.axis_size(SEQ))
    line = Lines([devices[::-1] if against_time else devices])
    state = jax.tree.map(lambda a: _varying(a, SEQ), state)
    if work is None:
        entering, done = _STRATEGIES[travel.strategy](transition, state, line, travel), (None, ())
    else:
        entering, done = all_scan_hops(transition, state, line, travel).beside(work)
    return entering, _of(line.last, transition(entering)), done


def _decided(transition: Any, state: State, travel: Travel) -> Travel:
    """With the strategy "auto", what the cost model chooses for these sizes."""
    if travel.strategy != "auto":
        return travel
    state_bytes = size_of(state)
    choice = cost.choose(state_bytes, size_of(transition) - state_bytes, lax.axis_size(SEQ))
    _once(logging.INFO, f"States of {state_bytes} bytes travel by {choice.why}.")
    return travel._replace(strategy=choice.strategy)


@functools.cache
def _once(level: int, message: str) -> None:
    logging.getLogger("seqlab").log(level, message)


def total(transition: Any) -> State:
    """Inside a shard: the sum of what all shards write, on each of them.

    What a recurrence without decay and without a causal mask reads: LASP-2's non-causal form (Sun
    et al., 2025) in one all-reduce, which moves less than its gather.
    """
    written = jax.tree.map(lambda a: _varying(a, SEQ), transition.update)
    return as_one(lambda a: lax.psum(a, SEQ), written)


def on_mesh(whole: Callable, shard: Callable, tokens: tuple, state: State, weights: tuple = ()):
    """Run f(*tokens, *weights, state) -> (y, state) by hand over the ambient mesh, if there is one.

    Tokens are [B, T, heads, ...], weights [heads, ...] and the state is [B, heads, ...]. A batch or
    heads that do not divide evenly stay whole; tokens with a single head are shared by all heads,
    if there are several. Of T tokens as many as divide evenly are split, and those that are left
    run on every device after them: exact, and said once, because it costs time.
    `shard` runs where time is split, `whole` where it is not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return whole(*tokens, *weights, state)
    length, devices = jax.tree.leaves(tokens)[0].shape[1], mesh.shape[SEQ]
    if length > devices and length % devices:
        even = length - length % devices
        _once(logging.WARNING, _UNEVEN.format(length, devices, length - even, even, even + devices))
        first, left = (
            jax.tree.map(lambda a: a[:, :even], tokens),
            jax.tree.map(lambda a: a[:, even:], tokens),
        )
        y, state = on_mesh(whole, shard, first, state, weights)
        y_left, state = on_mesh(whole, shard, left, state, weights)
        return jax.tree.map(lambda *a: jnp.concatenate(a, 1), y, y_left), state

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


def _of(chosen: jax.Array, tree):
    """On every device the tree of the one where `chosen` is true."""
    pick = lambda a: lax.psum(jnp.where(chosen, a, jnp.zeros_like(a)), SEQ)
    return as_one(pick, tree)


def _varying(a: jax.Array, *axes: str) -> jax.Array:
    """The same values, typed as differing along these mesh axes."""
    new = tuple(axis for axis in axes if axis not in jax.typeof(a).manual_axis_type.varying)
    return lax.pcast(a, new, to="varying") if new else a
