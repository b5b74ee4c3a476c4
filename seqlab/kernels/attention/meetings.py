"""Queries meet the keys of all devices along the mesh axis `seq`, inside a shard and in blocks.

Every one is a pair of functions like `here.see` and `here.pull`, the work on one device, and leaves
out what is not visible as these do. Bytes are those that a device sends, forward; P devices.
"""

import jax
from jax import lax

from seqlab.kernels.attention.here import joined, pull, see
from seqlab.kernels.attention.xla import (
    Answered,
    Gradients,
    Keys,
    Meeting,
    Queries,
    Seen,
    answer,
    nothing_seen,
    zero_gradients,
)
from seqlab.parallel.mesh import SEQ


def shift(tree, by: int = 1):
    """What the device `by` places before holds, around the ring."""
    size = lax.axis_size(SEQ)
    around = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda a: lax.ppermute(a, SEQ, around), tree)


def _gathered(keys: Keys) -> Keys:
    gather = lambda a, axis: lax.all_gather(a, SEQ, axis=axis, tiled=True)
    return Keys(gather(keys.k, 0), gather(keys.v, 0), gather(keys.at, 1))


def _gather_see(options, queries: Queries, keys: Keys, seen: Seen) -> Seen:
    return see(options, queries, _gathered(keys), seen)


def _gather_pull(options, done: Answered, keys: Keys, gradients: Gradients) -> Gradients:
    # gathered again, or they would be in memory from one pass to the other; the barrier keeps XLA
    # from seeing that it is the same
    keys, done = lax.optimization_barrier((keys, done))
    everyones = _gathered(keys)
    zeros = zero_gradients(done.q, everyones)
    d = pull(options, done, everyones, zeros._replace(q_turned=gradients.q_turned))
    home = lambda a: lax.psum_scatter(a, SEQ, scatter_dimension=0, tiled=True)
    return Gradients(d.q_turned, home(d.k), home(d.v))


def _ring_see(options, queries: Queries, keys: Keys, seen: Seen) -> Seen:
    def step(carry, _):
        seen, keys = carry
        ahead = shift(keys)  # needs nothing of what is computed meanwhile
        return (see(options, queries, keys, seen), ahead), None

    (seen, keys), _ = lax.scan(step, (seen, keys), length=lax.axis_size(SEQ) - 1)
    return see(options, queries, keys, seen)


def _ring_pull(options, done: Answered, keys: Keys, gradients: Gradients) -> Gradients:
    """The sums of dk and dv follow their keys one step behind, so that they too travel while the
    next block is computed."""
    zeros = zero_gradients(done.q, keys)

    def step(carry, _):
        sums, new, keys = carry
        sums = _followed(sums, new)
        ahead = shift(keys)
        return (sums, pull(options, done, keys, zeros._replace(q_turned=new.q_turned)), ahead), None

    new = pull(options, done, keys, zeros._replace(q_turned=gradients.q_turned))
    carry = (zeros.k, zeros.v), new, shift(keys)
    (sums, new, keys), _ = lax.scan(step, carry, length=lax.axis_size(SEQ) - 2)
    sums = _followed(sums, new)
    new = pull(options, done, keys, zeros._replace(q_turned=new.q_turned))
    return Gradients(new.q_turned, *_followed(sums, new))  # the last step brings them home


def _followed(sums, new: Gradients):
    return shift((sums[0] + new.k, sums[1] + new.v))


def _token_see(options, queries: Queries, keys: Keys, seen: Seen) -> Seen:
    visitors, seen = queries, see(options, queries, keys, seen)
    for step in range(1, lax.axis_size(SEQ)):
        visitors = shift(visitors)
        part = see(options, visitors, keys, nothing_seen(visitors.q, keys.v))
        seen = joined(seen, *shift(answer(part, visitors.q.dtype), -step))
    return seen


def _token_pull(options, done: Answered, keys: Keys, gradients: Gradients) -> Gradients:
    """Keys stay here too, and so do the sums of their gradients."""
    visitors, gradients = done, pull(options, done, keys, gradients)
    for step in range(1, lax.axis_size(SEQ)):
        visitors = shift(visitors)
        nothing = gradients._replace(q_turned=gradients.q_turned * 0)
        part = pull(options, visitors, keys, nothing)
        dq = gradients.q_turned + shift(part.q_turned, -step)
        gradients = part._replace(q_turned=dq)
    return gradients


#: LASP-2H (Sun et al., 2025), also context parallelism in Llama 3 (Grattafiori et al., 2024): one
#: all-gather of keys and values, (P - 1) T/P G (K + V) numbers; they are all in memory meanwhile.
GATHER = Meeting(_gather_see, _gather_pull)

#: Ring Attention (Liu et al., 2023): keys and values go around, the same bytes in P - 1 steps, and
#: never more than two devices' share of them is in memory.
RING = Meeting(_ring_see, _ring_pull)

#: TokenRing (Wang et al., 2024): queries go around one way, and what they saw is sent home the
#: other way, (P - 1) T/P H (K + V + 1) numbers. Less than the ring only without grouped heads.
TOKEN_RING = Meeting(_token_see, _token_pull)
