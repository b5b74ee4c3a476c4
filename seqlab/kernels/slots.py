"""Where routed tokens lie once they are sorted by memory, in shapes that depend on no number.

Each memory has a lane of slots in order of time, cut in chunks; the chunks that hold anything are
listed lane after lane, so that a chunk has one owner and none is long empty:

    | room, tokens of memory 0 | ... free | room, tokens of memory 1 | ... | free |

`room` slots in front of each memory's tokens are left for what came before them. No token is
dropped, whatever the load of a memory. The sort counts, and is stable: tokens of one memory keep
their order.

A document begins in a lane as many slots behind the room as it begins in the row, so that nothing
of the documents before it, not even their length in this memory, changes how its numbers are
rounded. In long rows of many documents there are not chunks enough for the gaps between them: there
documents follow each other directly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Slots(NamedTuple):
    """For T tokens with k choices each among M memories, in S slots."""

    place: jax.Array  # [B, T, k] the slot of each choice
    source: jax.Array  # [B, S] the choice t * k + j in each slot that is filled
    filled: jax.Array  # [B, S] bool
    owner: jax.Array  # [B, S] the memory that a slot belongs to
    reset: jax.Array  # [B, S] bool, a document starts here, as its memory sees it
    room: jax.Array  # [B, M, room] the slots in front of a memory's tokens
    end: jax.Array  # [B, M, room] the last slots of the current document, from the room on
    load: jax.Array  # [B, M] how many tokens of the current document a memory has
    same: jax.Array  # [B] bool, the document at the end is that which enters

    def hold(self, a: jax.Array) -> jax.Array:
        """Of a [B, T, k or 1, ...] what belongs in each slot, [B, S, ...]; zero in free ones."""
        B, T, k = a.shape[:3]
        source = self.source // (self.place.shape[2] // k)
        return only(self.filled, pick(a.reshape(B, T * k, *a.shape[3:]), source))


def laid(chosen: jax.Array, reset: jax.Array, memories: int, chunk: int, room: int = 0) -> Slots:
    """chosen [B, T, k] int, different memories in 0 .. M - 1; reset [B, T] bool."""
    B, T, k = chosen.shape
    length = -(-(room + T) // chunk)  # of a lane, in chunks
    count, documents = _enough(T * k + memories * room, memories, chunk)
    number = jnp.cumsum(reset, 1)
    apart = (number[:, -1] < documents) | (count >= memories * length)
    mine = jnp.sum(jax.nn.one_hot(chosen, memories, dtype=jnp.int32), 2, jnp.int32)  # [B, T, M]
    begin, rank = _in_lanes(mine, reset, apart)
    rows, each = jnp.arange(B)[:, None, None], jnp.arange(memories)

    held = jnp.zeros((B, memories, length), jnp.int32)  # 1 where a lane's chunk holds anything
    held = held.at[rows, each, (room + begin + rank) // chunk].max(mine)
    held = held.at[:, :, :1].max(jnp.int32(room > 0))
    listed = jnp.cumsum(held.reshape(B, -1), 1).reshape(held.shape) - held  # chunks before each
    slot = lambda m, at: listed[rows, m, at // chunk] * chunk + at % chunk
    ends = jnp.cumsum(jnp.sum(held, 2), 1)[:, None] * chunk

    place = slot(chosen, room + jnp.take_along_axis(begin + rank, chosen, 2))
    first = (jnp.take_along_axis(rank, chosen, 2) == 0) & (number > 0)[..., None]
    put = lambda empty, a: empty.at[rows, place].set(a, unique_indices=True)
    none = jnp.zeros((B, min(count, memories * length) * chunk), bool)
    choice = jnp.arange(T * k, dtype=jnp.int32).reshape(T, k)
    load = rank[:, -1] + mine[:, -1]
    return Slots(
        place=place,
        source=put(none.astype(jnp.int32), choice),
        filled=put(none, True),
        owner=jnp.sum(ends <= jnp.arange(none.shape[1])[:, None], -1).clip(max=memories - 1),
        reset=put(none, first),
        room=slot(each[:, None], jnp.broadcast_to(jnp.arange(room), (B, memories, room))),
        end=slot(each[:, None], (begin[:, -1] + load)[..., None] + jnp.arange(room)),
        load=load,
        same=number[:, -1] == 0,
    )


def _in_lanes(mine: jax.Array, reset: jax.Array, apart: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where in each lane a token's document begins, behind the room, and how many of its tokens are
    before this one: [B, T, M] each, of mine [B, T, M], 1 where a memory was chosen.

    Documents begin where they do in the row where these are to be `apart` [B], or else where those
    before them end.
    """
    time = jnp.arange(reset.shape[1], dtype=jnp.int32)
    start = lax.cummax(jnp.where(reset, time, 0), axis=1)[..., None]
    before = jnp.cumsum(mine, 1, jnp.int32) - mine
    skipped = jnp.take_along_axis(before, start, 1)
    return jnp.where(apart[:, None, None], start, skipped), before - skipped


def _enough(slots: int, memories: int, chunk: int) -> tuple[int, int]:
    """How many chunks to have for so many filled slots, and for how many documents that are apart
    they suffice: two, and those that a sixteenth more is enough for. A run of slots may share the
    chunks of its ends with nothing."""
    documents = 2 + slots // chunk // (32 * memories)
    return slots // chunk + memories * (2 * documents - 1), documents


def only(mask: jax.Array, a: jax.Array) -> jax.Array:
    """a [..., *more] where mask [...], zero elsewhere."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - mask.ndim)), a, 0)


def pick(a: jax.Array, at: jax.Array) -> jax.Array:
    """Of each row of a [B, S, ...] what is at [B, ...]: [B, *at, ...]."""
    return jax.vmap(lambda a, at: a[at])(a, at)
