"""Each token through the few experts that it was routed to, in three ways that agree.

dense   every expert on every token, weighed afterwards: the definition, and enough for few experts
blocks  tokens sorted by expert and cut into blocks of one expert each, so that an expert's work is
        that of its tokens; a handful of tokens reads the weights of its own experts alone
ragged  the same sorting, multiplied by `jax.lax.ragged_dot` (MegaBlocks, Gale et al., 2022)

None of them drops a token, whatever the load of an expert.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqlab.errors import ConfigError, nearest
from seqlab.kernels.precision import widen
from seqlab.parallel.mesh import DATA, SEQ

#: expert(multiply, weights, x) -> y: one expert's network, where multiply(x, w) stands for x @ w.
Expert = Callable[..., jax.Array]


def route(
    expert: Expert,
    weights: tuple[jax.Array, ...],
    x: jax.Array,
    chosen: jax.Array,
    share: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """y = sum_j share_j * expert_{chosen_j}(x), token by token.

    weights  [E, ...] each, the matrices of all experts
    x        [B, T, D]
    chosen   [B, T, k] int, different experts in 0 .. E - 1
    share    [B, T, k] float32

    Returns [B, T, D] in the dtype of x, summed in float32 or wider. `implementation` None is
    "blocks", on a CPU the fastest for one token and for thousands, unless experts are few. On a
    mesh every device sorts its own tokens. Raises ConfigError for an unknown implementation.
    """
    y = apart(expert, weights, x, chosen, implementation=implementation)
    return jnp.einsum("btk,btkd->btd", share, widen(y)).astype(x.dtype)


def apart(
    expert: Expert,
    weights: tuple[jax.Array, ...],
    x: jax.Array,
    chosen: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """What each chosen expert makes of a token, [B, T, k, D'], not yet weighed and summed; the
    arguments are those of `route`."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"experts have no implementation {implementation!r}: "
            + nearest(implementation, IMPLEMENTATIONS)
        )

    def run(weights, *tokens):
        flat = [a.reshape(-1, a.shape[-1]) for a in tokens]
        y = IMPLEMENTATIONS[implementation or "blocks"](expert, weights, *flat)
        return y.reshape(*tokens[0].shape[:-1], *y.shape[1:])

    return _by_shard(run, weights, x, chosen)


def _by_shard(run, weights, *tokens):
    """run(weights, *tokens), by each device on its own rows and times; `model` is left to XLA."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return run(weights, *tokens)
    sizes = zip((DATA, SEQ), tokens[0].shape[:-1], strict=False)
    split = P(*(axis if n % mesh.shape[axis] == 0 else None for axis, n in sizes))
    used = {axis for axis in split if axis}
    if not used:
        return run(weights, *tokens)
    specs = (P(), *(split for _ in tokens))
    return jax.shard_map(run, in_specs=specs, out_specs=split, axis_names=used)(weights, *tokens)


def dense(expert: Expert, weights, x, chosen) -> jax.Array:
    """The definition: x [N, D], chosen [N, k] -> [N, k, D']."""
    y = expert(jnp.matmul, weights, x[None])  # [E, N, D']
    return y[chosen, jnp.arange(len(x))[:, None]]


def blocks(expert: Expert, weights, x, chosen) -> jax.Array:
    """In blocks as long as an expert's part of an even load. Only the last block of an expert has
    room to spare, so that for any load the work is at most twice that of the tokens, and E more."""
    (N, k), E = chosen.shape, len(weights[0])
    size = -(-N * k // E)
    count = min(N * k, N * k // size + E)  # of blocks, at most, for any load
    rank, load = _ranks(chosen.reshape(-1), E)
    ends = jnp.cumsum(-(-load // size))  # in blocks, of each expert
    first = (ends - -(-load // size))[chosen.reshape(-1)]
    slot = first * size + rank  # [N * k]
    owner = jnp.sum(ends <= jnp.arange(count)[:, None], -1).clip(max=E - 1)  # [count]
    inputs = jnp.zeros((count * size, x.shape[-1]), x.dtype)
    inputs = inputs.at[slot].set(jnp.repeat(x, k, 0), unique_indices=True)
    multiply = lambda x, w: x @ w[owner]
    y = expert(multiply, weights, inputs.reshape(count, size, -1))
    return y.reshape(count * size, -1)[slot].reshape(N, k, -1)


def ragged(expert: Expert, weights, x, chosen) -> jax.Array:
    """Sorted by expert, in products of ragged groups."""
    (N, k), E = chosen.shape, len(weights[0])
    rank, load = _ranks(chosen.reshape(-1), E)
    slot = (jnp.cumsum(load) - load)[chosen.reshape(-1)] + rank
    inputs = jnp.zeros((N * k, x.shape[-1]), x.dtype)
    inputs = inputs.at[slot].set(jnp.repeat(x, k, 0), unique_indices=True)
    multiply = lambda x, w: jax.lax.ragged_dot(x, w, load)
    return expert(multiply, weights, inputs)[slot].reshape(N, k, -1)


def _ranks(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """How many choices before each [M] fell on the same expert, and how many on each expert [E]."""
    load = jnp.zeros(experts, jnp.int32).at[chosen].add(1)
    order = jnp.argsort(chosen, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    return place - (jnp.cumsum(load) - load)[chosen], load


IMPLEMENTATIONS = {"dense": dense, "blocks": blocks, "ragged": ragged}
