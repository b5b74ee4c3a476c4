"""All-Scan inside rows of devices, and across rows, so that a state makes few steps.

A line of P devices is folded into R = P / Q rows of Q. All rows at once:

    1. All-Scan along the row, not of states but of transitions: each device learns what the row's
       tokens before it do to a state, and the last device what the whole row does.
    2. The last device hands a Q-th of the latter to each device of its row (a reduce-scatter).
    3. Across rows, as a ring: the devices with the same part hand on their part of the state.
    4. The parts of the state that enters the row are gathered in it; 1 leads it to each device.

A device sends (Q + K - 2)(S + A) / K bytes along its row, S + A and S in the two collectives, and
(R - 1) S / Q across rows; steps one after another are (Q + K - 2) + (R - 1) and two collectives,
where All-Scan takes P + K - 2. Handing whole totals across rows would take Q times the bytes a hop,
and leave the state still to be told to the row: doing that by halves, 2 and 4, costs the same.

Parts run there and back: on a line laid as a snake, the device below is not the one with the same
place in the next row but with the mirrored one. So each hop is one link.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from seqlab.parallel import cost
from seqlab.parallel.lines import Cut, Lines, divisible, pipelined, size_of
from seqlab.parallel.mesh import SEQ, Travel
from seqlab.parallel.strategies import all_scan, blocks_for, ring
from seqlab.parallel.transitions import differing


def two_level(stretch, state, line: Lines, travel: Travel):
    """All-Scan in rows, a ring across them; `travel.row` devices make a row."""
    devices, sent = line.lines[0], size_of(state)
    length = travel.row or row_length(sent, size_of(stretch) - sent, line.size)
    if length in (1, line.size):
        return all_scan(stretch, state, line, travel)
    rows = [devices[i : i + length] for i in range(0, line.size, length)]
    row = Lines(rows)
    before = _before_in_row(stretch, row, travel)
    total = _where(row.first, stretch, before.then(stretch))
    entering = _across(_where(row.last, total, _zeros(total)), state, _there_and_back(rows), travel)
    return _where(row.first, entering, before(entering))


def row_length(state_bytes: int, transition_bytes: int, devices: int) -> int:
    """How many devices make a row: those of a process, if several processes share them evenly, else
    what the cost model thinks best. 1 if they make no rows."""
    own = jax.local_device_count()
    if jax.process_count() > 1 and 1 < own < devices and devices % own == 0:
        return own
    if not cost.rows(devices):
        return 1
    return cost.best_row(state_bytes, transition_bytes, devices, cost.this_link())


def _before_in_row(stretch, row: Lines, travel: Travel):
    """The transition of the stretches before this one in its row; undefined on the first."""
    blocks = blocks_for(stretch, stretch, row.size, travel.blocks)
    acting, sent = stretch.cut(blocks.axis), differing(stretch, blocks.axis)

    def leaving(number, before):
        alone = blocks.block(stretch, sent, number)
        joined = before.then(blocks.block(stretch, acting, number))
        return _where(row.first, alone, joined)

    return pipelined(row, leaving, stretch, sent, blocks)


def _across(total, state, rows, travel: Travel):
    """The state that enters each row, from what rows do to states (zero but on one device)."""
    length, groups = len(rows[0]), [list(row) for row in rows]
    lane = Lines(tuple(zip(*rows, strict=True)))
    part = Lines(rows).index
    axis = next((a for a, n in divisible(total, state).items() if n % length == 0), None)
    if axis is None:
        return ring(_told(total, groups), state, lane, travel)
    parts = Cut(axis, length)
    mine = jax.tree.map(
        lambda a, cut: _scattered(a, groups, axis) if cut else _told(a, groups),
        total,
        total.cut(axis),
    )
    everything = jax.tree.map(lambda _: True, state)
    entering = ring(mine, parts.block(state, everything, part), lane, travel)
    gather = lambda a: lax.all_gather(
        a, SEQ, axis_index_groups=groups, axis=a.ndim + axis, tiled=True
    )
    return jax.tree.map(gather, entering)


def _there_and_back(rows):
    return [row if i % 2 == 0 else row[::-1] for i, row in enumerate(rows)]


def _scattered(a, groups, axis: int):
    return lax.psum_scatter(
        a, SEQ, axis_index_groups=groups, scatter_dimension=a.ndim + axis, tiled=True
    )


def _told(tree, groups):
    """The sum over the group, to all of it: what a psum is, which has no groups under shard_map."""
    flat, restored = ravel_pytree(tree)
    size = len(groups[0])
    padded = jnp.pad(flat, (0, -flat.size % size))
    whole = lax.all_gather(
        _scattered(padded, groups, -1), SEQ, axis_index_groups=groups, tiled=True
    )
    return restored(whole[: flat.size])


def _where(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)
