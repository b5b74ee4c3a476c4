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
from seqlab.parallel.lines import Cut, Lines, divisible, pipeline, size_of
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

    return pipeline(row, leaving, stretch, sent, blocks).alone()


def _across(total, state, rows, travel: Travel):
    """The state that enters each row, from what rows do to states (zero but on one device)."""
    length, groups = len(rows[0]), [list(row) for row in rows]
    lane, part = Lines(tuple(zip(*rows, strict=True))), Lines(rows).index
    axis = next((a for a, n in divisible(total, state).items() if n % length == 0), None)
    if axis is None:  # every device of a row carries the whole state
        mine = _shared_out([total] * length, groups)
        return ring(mine, state, lane, travel)
    parts, cut = Cut(axis, length), total.cut(axis)
    mine = _shared_out([parts.block(total, cut, i) for i in range(length)], groups)
    everything = jax.tree.map(lambda _: True, state)
    entering = ring(mine, parts.block(state, everything, part), lane, travel)

    def gathered(a):
        along = a.ndim + axis
        return lax.all_gather(a, SEQ, axis_index_groups=groups, axis=along, tiled=True)

    return jax.tree.map(gathered, entering)


def _there_and_back(rows):
    return [row if i % 2 == 0 else row[::-1] for i, row in enumerate(rows)]


def _shared_out(parts, groups):
    """Part i, summed over the group, on its i-th device: one reduce-scatter."""
    flat = jnp.stack([ravel_pytree(part)[0] for part in parts])
    mine = lax.psum_scatter(flat, SEQ, axis_index_groups=groups)
    return ravel_pytree(parts[0])[1](mine)


def _where(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)
