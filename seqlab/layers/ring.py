"""What attention keeps of the tokens it may still see, in slots whose number never grows."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.attention import attention_with_lse
from seqlab.layers.document_length import refuse_overflow
from seqlab.parallel.halo import with_halo

Pair = tuple[jax.Array, jax.Array]


class Tokens(NamedTuple):
    arrays: Any  # of [B, S, ...]
    position: jax.Array  # [B, S]
    document: jax.Array  # [B, S], -1 for none


class Ring(NamedTuple):
    """Slots for the first tokens of a document, and slots that the tokens after share in turn.

    With a window: `sinks` and `window` slots. Without: `max_length` slots, one a token, and a
    document that is longer is refused, or gives NaN where its length is not known (in jax.jit).
    """

    window: int | None = None
    sinks: int = 0
    max_length: int | None = None

    @property
    def slots(self) -> int:
        return sum(self._parts)

    @property
    def limit(self) -> int | None:
        """Longest document that fits; None is no limit."""
        return self.max_length if self.window is None else None

    @property
    def _parts(self) -> tuple[int, int]:
        return (self.max_length or 0, 0) if self.window is None else (self.sinks, self.window)

    def empty(self, batch: int, heads: int, width: int) -> Pair:
        """Keys and values of no token, [B, G, slots, K] each."""
        k, v = (jnp.zeros((batch, heads, self.slots, width), jnp.float32) for _ in "kv")
        return k, v  # two buffers, for states are donated

    def held(self, position: jax.Array) -> jax.Array:
        """[B, slots]: the position of the token in each slot, -1 for none, before `position` [B].

        Token p < fixed is kept in slot p; token p >= fixed in slot fixed + (p - fixed) % ring,
        until token p + ring takes that slot.
        """
        fixed, ring = self._parts
        last, slot = position[:, None] - 1, jnp.arange(fixed + ring, dtype=jnp.int32)
        held = jnp.where(slot < fixed, slot, last - (last - slot) % max(ring, 1))
        return jnp.where((held >= jnp.minimum(slot, fixed)) & (held <= last), held, -1)

    def take(self, old: Any, new: Any, start, position, reset) -> tuple[Pair, Tokens, Any, Any]:
        """Position and document of T tokens, [B, T] each; what they may see, in the dtype of `new`;
        what more of the past, or None; and the slots after them.

        old, new: arrays [B, ..., slots, K] and [B, T, ..., K], or trees of them; start [B], where
        the state stands; position, reset [B, T]. A step (T == 1) is written to its slot, finds
        itself among the slots and has no other past: they are read once and nothing is moved.
        """
        document = jnp.cumsum(reset, 1, dtype=jnp.int32)  # what the state holds is document 0
        if position.shape[1] == 1:
            kept = self._put(old, new, position[:, 0], reset[:, 0])
            arrays = jax.tree.map(lambda a, new: _in_time(a).astype(new.dtype), kept, new)
            held = self.held(position[:, 0] + 1)
            tokens, past = Tokens(arrays, held, jnp.where(held < 0, -1, document)), None
        else:
            kept = self._kept(old, new, position[:, -1] + 1)
            tokens, held = Tokens(new, position, document), self.held(start)
            past = Tokens(jax.tree.map(_in_time, old), held, jnp.where(held < 0, -1, 0))
        return (position, document), tokens, past, kept

    def attend(self, q, k, v, old: Pair, start, position, reset, **options) -> tuple[Pair, Pair]:
        """What T queries see of the tokens that come with them and of those kept before, and what
        is kept then.

        q [B, T, H, K]; k, v [B, T, G, K]; old, start, position, reset as `take` has them; options
        of `kernels.attention`, which says what is returned of the queries.
        """
        at, tokens, past, kept = self.take(old, (k, v), start, position, reset)
        past = past and (*past.arrays, *past[1:])
        sight = {"window": self.window, "sinks": self.sinks}
        (k, v), *k_at = tokens
        seen = attention_with_lse(q, k, v, *at, *k_at, past=past, **sight, **options)
        return seen, kept

    def _kept(self, old: Any, new: Any, position: jax.Array) -> Any:
        """The slots after new tokens, of which `position` [B] is the end; `old` in dtype."""
        held = self.held(position)  # [B, slots]

        def update(old, new):
            # a token keeps its slot while held, so what is not new already lies where it should
            at, new = new.shape[1] - (position[:, None] - held), _in_slots(new).astype(old.dtype)
            new = jnp.take_along_axis(new, _beside(at.clip(0), old), -2, mode="clip")
            return jnp.where(_beside(held < 0, old), 0, jnp.where(_beside(at < 0, old), old, new))

        return jax.tree.map(update, old, new)

    def _put(self, old: Any, new: Any, position: jax.Array, reset: jax.Array) -> Any:
        """The slots after one token, [B, 1, ...] at `position` [B]. No slot but its own is written,
        and the others are cleared at a `reset` [B] alone."""
        fixed, ring = self._parts
        turn = fixed + (position - fixed) % max(ring, 1)
        slot = jnp.where(position < fixed, position, turn) if ring else position
        put = lambda old, new: _written(old, _in_slots(new).astype(old.dtype), slot, reset)
        return jax.tree.map(put, old, new)

    def before(self, old: Any, start: jax.Array, few: int | None = None) -> Any:
        """The `window` tokens before the next, or the first few of them, in order [B, few, ..., K];
        anything where there are none, or they are sinks.

        old: arrays [B, ..., slots, K] as `take` has them, or trees of them; start [B].
        """
        fixed, ring = self._parts
        place = start[:, None] - ring + jnp.arange(few or ring, dtype=jnp.int32)
        slot = fixed + (place - fixed) % ring
        pick = lambda a: _in_time(jnp.take_along_axis(a, _beside(slot, a), -2))
        return jax.tree.map(pick, old)

    def leaving(self, old: Any, new: Any, start: jax.Array, position: jax.Array) -> tuple:
        """The token that each of T tokens takes the slot from, [B, T, ..., K], and whether there is
        one, [B, T]: nothing sees it from then on.

        old, new, start [B], position [B, T]: as `take` has them.
        """
        fixed, ring = self._parts
        last = lambda new: new[:, -ring:]
        later = lambda new, old: with_halo(_later, last, ring, (new,), old.astype(new.dtype))[0]
        old = self.before(old, start, min(ring, position.shape[1]))
        return jax.tree.map(later, new, old), position >= fixed + ring

    def refuse_overflow(self, position: jax.Array) -> None:
        """Raises ModelError if it can be known that positions [B, T] do not fit."""
        if self.limit is not None:
            refuse_overflow(position, self.limit, "Full attention", " or a window")

    def mark_overflow(self, y: jax.Array, position: jax.Array) -> jax.Array:
        """y [B, T, D], NaN from the first token on that does not fit."""
        if self.limit is None:
            return y
        return jnp.where((position < self.limit)[..., None], y, jnp.nan)


@jax.custom_jvp
def _written(old: jax.Array, new: jax.Array, slot: jax.Array, reset: jax.Array) -> jax.Array:
    """old [B, ..., slots, K], 0 where `reset` [B] says so, with new [B, ..., 1, K] in slot [B], or
    in the last one if there is no such slot: then the document is too long, and none of it is read.

    Loops of as many turns as it takes, none or one, since XLA writes what they carry where it lies.
    It copies what a `cond` may change, and a single row that is changed outside of any loop.
    """
    clear = lambda _, a: jnp.where(_beside(reset[:, None], a), 0, a)
    old = lax.fori_loop(0, jnp.any(reset).astype(int), clear, old)
    if len(slot) > 1:
        return jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=-2))(old, new, slot)
    put = lambda _, a: lax.dynamic_update_slice_in_dim(a, new, slot[0], -2)
    return lax.fori_loop(0, (slot[0] < old.shape[-2]).astype(int), put, old)


@_written.defjvp
def _written_jvp(primals, tangents):
    old, _, slot, reset = primals
    here = _beside(jnp.arange(old.shape[-2]) == slot[:, None], old)
    d_old = jnp.where(_beside(reset[:, None], old), 0, tangents[0])
    return _written(*primals), jnp.where(here, tangents[1], d_old)


def _beside(numbers: jax.Array, a: jax.Array) -> jax.Array:
    """Numbers [B, slots] as they stand beside [B, ..., slots, K]."""
    return jnp.expand_dims(numbers, (*range(1, a.ndim - 2), -1))


def _in_slots(a: jax.Array) -> jax.Array:
    """[B, T, ..., K] -> [B, ..., T, K]: a head's tokens lie together, as a step reads them."""
    return jnp.moveaxis(a, 1, -2)


def _in_time(a: jax.Array) -> jax.Array:
    """[B, ..., T, K] -> [B, T, ..., K]"""
    return jnp.moveaxis(a, -2, 1)


def _later(new: jax.Array, before: jax.Array) -> Pair:
    """[B, T, ...] behind the few tokens `before`, of which the last fall out, and these."""
    both, T = jnp.concatenate([before, new], 1), new.shape[1]
    return both[:, :T], both[:, T:]
