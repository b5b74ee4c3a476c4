"""What a layer needs of the few tokens before its own, when time is split over the axis `seq`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqlab.parallel.mesh import SEQ


def with_halo(
    run: Callable, end: Callable, reach: int, tokens: tuple, state: jax.Array, weights: tuple = ()
) -> Any:
    """y, state = run(*tokens, *weights, state), where a state is that of `reach` tokens alone.

    tokens   arrays [B, T, ...]
    weights  arrays, the same for all tokens
    state    an array [B, ...]
    end      end(*tokens) -> the state after at least `reach` tokens, whatever was before them

    Where the ambient mesh splits time, every device hands the state after its own tokens to the
    next: one hop for all at once, of the bytes of one state, and the same for gradients. A shard of
    fewer than `reach` tokens, and a time that does not divide evenly, are left to XLA.
    """
    mesh, T = jax.sharding.get_abstract_mesh(), tokens[0].shape[1]
    if mesh.empty or AxisType.Manual in mesh.axis_types or mesh.shape[SEQ] == 1:
        return run(*tokens, *weights, state)
    size = mesh.shape[SEQ]
    if T % size or T // size < reach or not reach:
        return run(*tokens, *weights, state)

    def shard(tokens, weights, state):
        me, onward = lax.axis_index(SEQ), [(i, i + 1) for i in range(size - 1)]
        # what all shards share enters as copies, so that the gradients of all are summed
        weights, state = lax.pcast((weights, state), SEQ, to="varying")
        before = lax.ppermute(end(*tokens), SEQ, onward).astype(state.dtype)
        y, state = run(*tokens, *weights, jnp.where(me == 0, state, before))
        return y, lax.psum(jnp.where(me == size - 1, state, 0), SEQ)

    # by hand along `seq` only: how batch and channels are split stays XLA's choice
    time = P(None, SEQ)
    split = jax.shard_map(shard, in_specs=(time, P(), P()), out_specs=(time, P()), axis_names={SEQ})
    return split(tokens, weights, state)
