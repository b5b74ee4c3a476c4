"""A recurrence whose step is a whole layer: what it does in a segment needs what it learned in the
segments before, so that attention and memory run inside the scan."""

from collections.abc import Callable

import jax

from seqlab.kernels.test_time_memory.windows import places, scan_windows
from seqlab.parallel import sequence
from seqlab.parallel.relay import relay


def scan_segments(
    run: Callable, options, x, reset, weights, state, phase, *, chunk_size: int
) -> tuple:
    """y [B, T, D], the state and the phase after all tokens of x [B, T, D].

    run, options, weights, state are those of `scan_windows`, with one token array, x, and a y of
    its shape; phase [B] int32 is the place in its segment of the token that comes next. Where a
    mesh splits time, rows are relayed (`parallel.relay`); heads are not split, since the layer
    mixes them.
    """

    def whole(x, reset, weights, state):
        (weights, (state, phase)), x = _without_heads((weights, state)), x[:, :, 0]
        place = places(reset, phase, chunk_size)
        y, state = scan_windows(
            run, options, (x,), reset, place, weights, state, chunk_size=chunk_size
        )
        state = state, (place[:, -1] + 1) % chunk_size
        return y[:, :, None].astype(x.dtype), jax.tree.map(lambda a: a[:, None], state)

    shard = lambda *args: relay(whole, args[:2], args[2:3], args[3])
    weights = jax.tree.map(lambda a: a[None], weights)
    state = jax.tree.map(lambda a: a[:, None], (state, phase))
    y, state = sequence.on_mesh(whole, shard, (x[:, :, None], reset), state, (weights,))
    state, phase = jax.tree.map(lambda a: a[:, 0], state)
    return y[:, :, 0], state, phase


def _without_heads(tree: tuple):
    weights, state = tree
    return jax.tree.map(lambda a: a[0], weights), jax.tree.map(lambda a: a[:, 0], state)
