"""How states get from device to device, each way with the same result.

A strategy is f(stretch, state, line, travel) -> the state that enters this device's shard, from

    stretch  the transition of this device's shard
    state    what enters the first device, known to all
    line     the devices in order of time (`Lines`, a single one), or against it
    travel   the mesh's `Travel`, for options

With P devices, a state of S bytes and transitions that have A bytes beside it, a device sends:

    all_gather  (P - 1)(S + A)              in one collective
    ring        (P - 1) S                   in P - 1 steps, each waiting for the one before
    all_scan    (P + K - 2) S / K           in P + K - 2 steps of a K-th of a state
    doubling    log2(P) (S + A) + S         in log2(P) + 1 steps, over longer and longer distances
    window      hops S                      in `hops` steps; older than that is forgotten
    two_level   see `parallel.two_level`
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from seqlab.errors import ConfigError
from seqlab.parallel import all_scan_tpu, cost
from seqlab.parallel.lines import Cut, Lines, Pipeline, divisible, pipeline, size_of
from seqlab.parallel.mesh import SEQ, Travel
from seqlab.parallel.transitions import Diagonal

#: Memory is laid out in tiles of this many rows and columns on a TPU: blocks keep them whole.
TILE = {-1: 128, -2: 8}


def all_gather(stretch, state, line: Lines, travel: Travel):
    """LASP-2 (Sun et al., 2025): one collective, then everyone folds the transitions before it."""
    flat, restored = ravel_pytree(stretch)  # one buffer: one collective

    def folded(flat, state, tile):
        padded = jnp.pad(flat, (0, -flat.size % tile)).reshape(-1, min(tile, TILE[-1]))
        everyone, me = lax.all_gather(padded, SEQ), lax.axis_index(SEQ)

        def step(carry, device):
            state, mine = carry
            mine = jax.tree.map(lambda s, m: jnp.where(device == me, s, m), state, mine)
            there = restored(everyone[device].reshape(-1)[: flat.size])
            return (there(state), mine), None

        return lax.scan(step, (state, state), jnp.array(line.lines[0]))[0][1]

    # of what is not whole tiles, XLA makes an all-reduce on a TPU, which sends twice as much
    whole_tiles = functools.partial(folded, tile=TILE[-1] * TILE[-2])
    as_it_is = functools.partial(folded, tile=1)
    return lax.platform_dependent(flat, state, tpu=whole_tiles, default=as_it_is)


def ring(stretch, state, line: Lines, travel: Travel):
    """LASP-1 (Sun et al., 2024): device after device passes on the whole state."""
    everything = jax.tree.map(lambda _: True, state)
    return pipeline(line, lambda _, s: stretch(s), state, everything, Cut(-1, 1)).alone()


def all_scan(stretch, state, line: Lines, travel: Travel):
    """All-Scan (ZeCO, Chou et al., 2025): as ring, but in blocks, so that all devices are busy:
    while one sends a block on, it receives the next. On a TPU decays are led by remote copies."""
    blocks = blocks_for(stretch, state, line.size, travel.blocks)

    def looped(stretch, state):
        return all_scan_hops(stretch, state, line, travel).alone()

    def copied(stretch, state):
        (decay, update), back = stretch, line.lines[0][0] != 0
        return all_scan_tpu.all_scan(decay, update, state, SEQ, back, blocks.count)

    if not (isinstance(stretch, Diagonal) and getattr(state, "dtype", None) == jnp.float32):
        return looped(stretch, state)  # matrices, complex planes, float64
    return lax.platform_dependent(stretch, state, tpu=copied, default=looped)


def all_scan_hops(stretch, state, line: Lines, travel: Travel) -> Pipeline:
    """All-Scan hop by hop."""
    blocks = blocks_for(stretch, state, line.size, travel.blocks)
    cut = stretch.cut(blocks.axis)
    everything = jax.tree.map(lambda _: True, state)
    leaving = lambda number, entering: blocks.block(stretch, cut, number)(entering)
    return pipeline(line, leaving, state, everything, blocks)


def doubling(stretch, state, line: Lines, travel: Travel):
    """Transitions of 1, 2, 4, ... devices are joined with those before (Hillis & Steele, 1986)."""
    distance = 1
    while distance < line.size:
        joined = line.send(stretch, distance).then(stretch)
        keep = lambda new, old, far=line.index >= distance: jnp.where(far, new, old)
        stretch = jax.tree.map(keep, joined, stretch)
        distance *= 2
    return _first_else(line, state, line.send(stretch(state)))


def window(stretch, state, line: Lines, travel: Travel):
    """As many steps as `hops`, in which all devices send: exact if no document touches more than
    hops + 1 shards, and silently wrong for one that does.

    Where documents begin is data, so no compiled program can tell. Training compares every batch
    with `packing.hops_needed`; with `use_mesh` alone that is yours to do.
    """
    start = _first_else(line, state, jax.tree.map(jnp.zeros_like, state))
    step = lambda _, entering: _first_else(line, state, line.send(stretch(entering)))
    return lax.fori_loop(0, min(travel.hops or 0, line.size - 1), step, start)


def blocks_for(stretch, message, devices: int, wanted: int | None) -> Cut:
    """How to cut what is sent: in as many blocks as wanted, else in about as many as the cost model
    thinks best; along the first axis that allows it."""
    limits = divisible(stretch, message)
    if wanted is not None:
        for axis, limit in limits.items():
            if limit % wanted == 0:
                return Cut(axis, wanted)
        raise ConfigError(
            f"blocks={wanted} does not divide a state of shape "
            f"{list(jax.tree.leaves(message)[-1].shape)}: take a divisor of one of "
            f"{sorted(set(limits.values()))}, or leave blocks out."
        )
    ideal = cost.best_blocks(size_of(message), devices, cost.this_link())
    found = [Cut(axis, n) for axis, limit in limits.items() for n in _counts(axis, limit)]
    arrays = lambda axis: sum(jax.tree.leaves(stretch.cut(axis)))  # each is an instruction a hop
    return min(found, key=lambda cut: (abs(math.log(cut.count / ideal)), arrays(cut.axis)))


def _counts(axis: int, limit: int) -> list[int]:
    tile = TILE.get(axis, 1)
    return [n for n in range(1, limit + 1) if limit % n == 0 and (n == 1 or limit // n % tile == 0)]


def _first_else(line: Lines, state, arrived):
    return jax.tree.map(lambda s, a: jnp.where(line.first, s, a), state, arrived)
