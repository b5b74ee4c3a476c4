"""A matrix memory of which there are several, each token writing to and reading from few of them.

Tokens are sorted by memory into chunks (see `slots`), pass a short convolution over the tokens of
their own memory, and then the chunked form of the memory's recurrence, chunk by chunk in a bank of
memories (see `bank`). On a mesh each device sorts its own tokens: what they do to each memory is a
transition, the identity where a memory has no token, and a convolution's inputs are moved on by
another. A single token touches the memories it chose alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels import chunk_scan
from seqlab.kernels.bank import Bank
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.precision import widen
from seqlab.kernels.short_conv import short_conv
from seqlab.kernels.slots import Slots, laid, only, pick
from seqlab.parallel import sequence
from seqlab.parallel.mesh import current_travel
from seqlab.parallel.transitions import Matrix


class Kind(Protocol):
    """What kind of memory there are several of."""

    recurrence: Callable  # for one token
    chunk: Any  # one chunk of its chunked form

    def tokens(self, qkv, gates, *weights) -> tuple:
        """What the recurrence takes before `reset`, from qkv [B, S, H, 2 K + V], convolved, and
        gates [B, S, H, g]; if these are zeros, a memory is left as it is."""
        ...


class Memories(NamedTuple):
    """The state of M memories."""

    conv: Any  # [B, H, M, W - 1, 2 K + V] the last inputs of each; () without a convolution
    memory: jax.Array  # [B, H, M, K, V]


class Routed(NamedTuple):
    """What each of T tokens brings, for its k choices among M memories.

    `shared` is what is the same for all its choices. Both make up q, k and v, in this order.
    """

    shared: jax.Array  # [B, T, H, 1, C]
    own: jax.Array  # [B, T, H, k or 1, 2 K + V - C]
    gates: jax.Array | None  # [B, T, H, k or 1, g]
    chosen: jax.Array  # [B, T, 1, k] int, different memories
    share: jax.Array  # [B, T, 1, k] float32, what a read is multiplied by


def routed(
    kind: Kind,
    tokens: Routed,
    reset: jax.Array,
    taps: jax.Array | None,
    weights: tuple,
    state: Memories,
    *,
    chunk_size: int = 64,
) -> tuple[jax.Array, Memories]:
    """y_t = sum_j share_j read of memory chosen_j, after token t has been written to it.

    reset    [B, T] bool, true where a document starts: all memories are empty there
    taps     [H, W, 2 K + V] of the short convolution, or None
    weights  arrays [H, ...], of the kind

    Returns y [B, T, H, V] in the dtype of the tokens, and the state after the last.
    """

    def run(on_shard: bool, *args):
        *tokens, reset, taps, weights, state = args
        tokens = Routed(*tokens)
        if reset.shape[1] == 1 and not on_shard:
            return _step(kind, tokens, reset, taps, weights, state)
        return _sorted(kind, tokens, reset, taps, weights, state, chunk_size, on_shard)

    whole, shard = (lambda *args, own=own: run(own, *args) for own in (False, True))
    return sequence.on_mesh(whole, shard, (*tokens, reset), state, (taps, weights))


def _step(kind, tokens: Routed, reset, taps, weights, state: Memories):
    """One token: its choices are rows of their own."""
    B, k = len(reset), tokens.chosen.shape[-1]
    clear = lambda state: jax.tree.map(lambda a: only(~reset[:, 0], a), state)
    state = lax.cond(jnp.any(reset), clear, lambda state: state, state)
    at = jnp.arange(B)[:, None], slice(None), tokens.chosen[:, 0, 0]
    rows = lambda a: a.reshape(B * k, *a.shape[2:])  # [B, k, H, ...]
    taken = jax.tree.map(lambda a: rows(a[at]), state)

    each = lambda a: rows(jnp.moveaxis(jnp.repeat(a[:, 0], k // a.shape[3], 2), 2, 1))[:, None]
    shared, own, gates = jax.tree.map(each, tokens[:3])  # [B k, 1, H, ...]
    qkv, fresh = jnp.concatenate([shared, own], -1), jnp.zeros((B * k, 1), bool)
    conv = state.conv
    if taps is not None:
        qkv, inputs = _convolved(taps, qkv, fresh, taken.conv)
        conv = conv.at[at].set(inputs.reshape(B, k, *inputs.shape[1:]))
    given = kind.tokens(qkv, gates, *weights)
    y, memory = kind.recurrence(*given, fresh, taken.memory)
    y = jnp.einsum("bk,bkhv->bhv", tokens.share[:, 0, 0], widen(y).reshape(B, k, *y.shape[2:]))
    memory = state.memory.at[at].set(memory.reshape(B, k, *memory.shape[1:]))
    return y[:, None].astype(qkv.dtype), Memories(conv, memory)


def _sorted(kind, tokens: Routed, reset, taps, weights, state: Memories, chunk_size, on_shard):
    """Many tokens, of the whole sequence or of a shard."""
    M, size = state.memory.shape[2], chunk_length(reset, chunk_size)
    room = 0 if taps is None else taps.shape[1] - 1
    slots = laid(tokens.chosen[:, :, 0], reset, M, size, room)
    held = lambda a: slots.hold(jnp.moveaxis(a, 3, 2))
    shared, own, gates = jax.tree.map(held, tokens[:3])
    qkv, conv = jnp.concatenate([shared, own], -1), state.conv
    if taps is not None:
        pushed = _pushed(slots, qkv, room)
        if on_shard:
            entering, conv = sequence.enter(pushed, conv, current_travel())
        else:
            entering, conv = conv, pushed(conv).astype(conv.dtype)
        qkv = _with_room_filled(slots, qkv, entering)
        # taps reach no further than the room in front of a memory's tokens
        qkv, _ = _convolved(taps, qkv, slots.reset, jnp.zeros_like(conv[:, :, 0]))
    given = [only(slots.filled, a) for a in kind.tokens(qkv, gates, *weights)]
    given, bank, memory = (*given, slots.reset), Bank(kind.chunk), state.memory
    # a document that starts after the last token of a memory empties it too
    current = (slots.same[:, None] | (slots.load > 0))[:, None]
    if on_shard:
        done = bank.transition(slots.owner, given, M, size)
        done = jax.tree.map(lambda a: only(current, a), done)
        memory, left = sequence.enter(done, memory, current_travel())
    y, after = chunk_scan.scan_chunks(bank, (slots.owner, *given), memory, size)
    left = left if on_shard else only(current, after)
    y = jnp.einsum("btk,btkhv->bthv", tokens.share[:, :, 0], widen(pick(y, slots.place)))
    return y.astype(qkv.dtype), Memories(conv, left)


def _convolved(taps, x, reset, inputs):
    """The short convolution of x [B, S, H, C] behind `inputs` [B, H, W - 1, C]."""
    flat = lambda a: a.reshape(*a.shape[:-2], -1)
    weight = flat(jnp.moveaxis(taps, 0, 1)).astype(x.dtype)
    y, inputs = short_conv(weight, flat(x), reset, flat(jnp.moveaxis(inputs, 1, 2)))
    inputs = inputs.reshape(*inputs.shape[:2], *x.shape[2:])
    return y.reshape(x.shape), jnp.moveaxis(inputs, 2, 1)


def _pushed(slots: Slots, x, room: int) -> Matrix:
    """What tokens x [B, S, H, C] do to the last inputs [B, H, M, room, C] of each memory: they move
    them up by as many as they are."""
    place = jnp.arange(room)
    moves = place[:, None] + slots.load[..., None, None] == place  # [B, M, room, room]
    moves &= slots.same[:, None, None, None]
    new = only(place + slots.load[..., None] >= room, pick(x, slots.end))  # [B, M, room, H, C]
    return Matrix(moves[:, None].astype(x.dtype), jnp.moveaxis(new, 3, 1))


def _with_room_filled(slots: Slots, x, inputs):
    """x [B, S, H, C] with the last inputs [B, H, M, room, C] before each memory's tokens."""
    inputs = jnp.moveaxis(inputs, 1, 3).astype(x.dtype)  # [B, M, room, H, C]
    return jax.vmap(lambda x, at, new: x.at[at].set(new))(x, slots.room, inputs)
