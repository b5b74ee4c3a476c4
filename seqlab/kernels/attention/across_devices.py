"""Softmax attention while the mesh axis `seq` splits time, by any of six methods.

All see the same keys, those that `visible` allows by position and document, and agree with one
device to rounding. They differ in what travels; `parallel.mesh.Travel.attention` names one.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqlab.errors import ConfigError
from seqlab.kernels.attention import rsa, zigzag
from seqlab.kernels.attention.here import HERE
from seqlab.kernels.attention.meetings import GATHER, RING, TOKEN_RING
from seqlab.kernels.attention.xla import (
    InXLA,
    Meeting,
    Options,
    attend,
    block_for,
    in_columns,
    in_order,
    in_rows,
)
from seqlab.kernels.platforms import Forms
from seqlab.parallel.mesh import DATA, MODEL, SEQ, current_travel

#: q, position, document of [B, T, ...], and k, v, position, document of [B, S, ...]
Tokens = tuple[jax.Array, ...]


def time_is_split(q: jax.Array, k: jax.Array) -> bool:
    """Whether the ambient mesh cuts these tokens evenly; what it cannot cut is left to XLA."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or mesh.shape[SEQ] == 1:
        return False
    return not (q.shape[1] % mesh.shape[SEQ] or k.shape[1] % mesh.shape[SEQ])


def heads_are_split(q: jax.Array) -> bool:
    """Whether the ambient mesh cuts nothing but the batch and heads, and these evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or mesh.size == 1:
        return False
    B, _, H, _ = q.shape
    return not (mesh.shape[SEQ] > 1 or B % mesh.shape[DATA] or H % mesh.shape[MODEL])


def across_devices(queries: Tokens, keys: Tokens, past: Tokens | None, options: Options):
    """y and log-sum-exp, split in time as the queries are.

    queries, keys, past are global arrays; `past` is whole on every device. Raises ConfigError where
    the method cannot split these heads.
    """
    method = METHODS[current_travel().attention]

    def local(queries, keys, past):
        # each device has gradients for the past, and they are summed
        past = jax.tree.map(lambda a: lax.pcast(a, SEQ, to="varying"), past)
        return method(options, queries, keys, past)

    return _in_shards(local, queries, keys, past, SEQ)


def each_device(run: Callable, queries: Tokens, keys: Tokens):
    """run(q, k, v, *places) of the batch and the heads of each device."""

    def local(queries, keys, past):
        (q, *q_at), (k, v, *k_at) = queries, keys
        return run(q, k, v, *q_at, *k_at)

    return _in_shards(local, queries, keys, None, None)


def _in_shards(local: Callable, queries: Tokens, keys: Tokens, past: Tokens | None, time):
    mesh, (B, _, H, _) = jax.sharding.get_abstract_mesh(), queries[0].shape
    model = mesh.shape[MODEL]
    batch = DATA if mesh.shape[DATA] > 1 and B % mesh.shape[DATA] == 0 else None
    heads = MODEL if model > 1 and H % model == 0 else None
    if heads:  # fewer key heads than devices: some devices have the same one
        keys, past = spread(keys, model), past and spread(past, model)
    place = lambda time: lambda a: P(*(batch, time, heads if a.ndim > 2 else None)[: a.ndim])
    specs = *jax.tree.map(place(time), (queries, keys)), jax.tree.map(place(None), past)
    out = P(batch, time, heads)
    return jax.shard_map(local, in_specs=specs, out_specs=(out, out))(queries, keys, past)


def spread(keys: Tokens, parts: int) -> Tokens:
    """The keys with as many copies of each head as it takes to split them in equal parts."""
    k, v, *at = keys
    copies = math.lcm(k.shape[2], parts) // k.shape[2]
    return *(jnp.repeat(a, copies, 2) if copies > 1 else a for a in (k, v)), *at


def met(meeting: Meeting) -> Callable:
    """The method in which this shard's tokens, cut in blocks as they stand, meet so."""

    def method(options: Options, queries: Tokens, keys: Tokens, past: Tokens | None):
        rows, columns = block_for(options.window)
        q, G = queries[0], keys[0].shape[2]
        before = past and in_columns(past, columns)
        blocks = in_rows(queries, G, rows), in_columns(keys, columns), before
        return in_order(attend(Forms(InXLA(options, meeting)), *blocks), q.shape[:3])

    return method


def ulysses(options: Options, queries: Tokens, keys: Tokens, past: Tokens | None):
    """Each device takes all tokens for some of the heads (Jacobs et al., 2023, DeepSpeed-Ulysses):
    4 all-to-all of what is local, (P - 1)/P T/P (2 H K + 2 G K) numbers."""
    (q, *q_at), size, me = queries, lax.axis_size(SEQ), lax.axis_index(SEQ)
    if q.shape[2] % size:
        raise ConfigError(
            f"attention='ulysses' cannot split {q.shape[2]} heads (of each device along `model`) "
            f"over seq={size}: make heads a multiple of it, or use attention='ring'."
        )
    gather = lambda a: lax.all_gather(a, SEQ, axis=1, tiled=True)
    by_head = lambda a: lax.all_to_all(a, SEQ, split_axis=2, concat_axis=1, tiled=True)
    by_time = lambda a: lax.all_to_all(a, SEQ, split_axis=1, concat_axis=2, tiled=True)
    mine = lambda a: lax.dynamic_slice_in_dim(a, me * (n := a.shape[2] // size), n, 2)
    k, v, *k_at = spread(keys, size)
    if past is not None:
        past_k, past_v, *past_at = spread(past, size)
        past = mine(past_k), mine(past_v), *past_at
    queries = by_head(q), *map(gather, q_at)
    y, lse = met(HERE)(options, queries, (by_head(k), by_head(v), *map(gather, k_at)), past)
    return by_time(y), by_time(lse)


#: By the names in `parallel.mesh.ATTENTIONS`.
METHODS = {
    "gather_kv": met(GATHER),
    "ring": met(RING),
    "zigzag": zigzag.balanced,
    "token_ring": met(TOKEN_RING),
    "ulysses": ulysses,
    "rsa": rsa.ring_self_attention,
}
