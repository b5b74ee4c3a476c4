"""What attention keeps of the tokens it may still see, in slots whose number never grows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.attention import attention_with_lse
from seqlab.layers.document_length import refuse_overflow
from seqlab.parallel.halo import with_halo

Pair = tuple[jax.Array, jax.Array]


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
        """Keys and values of no token, [B, slots, G, K] each."""
        k, v = (jnp.zeros((batch, self.slots, heads, width), jnp.float32) for _ in "kv")
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

    def places(self, start: jax.Array, position: jax.Array, reset: jax.Array) -> tuple:
        """Position and document of T tokens, [B, T] each, and of what the slots hold, [B, slots]
        each, as `kernels.attention` takes them.

        start [B], where the state stands; position, reset [B, T].
        """
        held = self.held(start)
        document = jnp.cumsum(reset, 1, dtype=jnp.int32)  # what the state holds is document 0
        return (position, document), (held, jnp.where(held < 0, -1, 0))

    def attend(self, q, k, v, kept: Pair, places: tuple, **options) -> tuple[Pair, Pair]:
        """What T queries see of the tokens that come with them and of those `kept`, and what is
        kept then.

        q [B, T, H, K]; k, v [B, T, G, K]; kept: k and v [B, slots, G, K]; `places` of these tokens;
        options of `kernels.attention`, which says what is returned of the queries.
        """
        at, held = places
        sight = {"window": self.window, "sinks": self.sinks}
        seen = attention_with_lse(q, k, v, *at, *at, past=(*kept, *held), **sight, **options)
        return seen, self.keep(kept, (k, v), at[0][:, -1] + 1)

    def keep(self, old: Any, new: Any, position: jax.Array) -> Any:
        """The slots after new tokens, of which `position` [B] is the end.

        old, new: arrays [B, slots, ...] and [B, T, ...], or trees of them; as `old` in dtype.
        """
        held = self.held(position)  # [B, slots]

        def update(old, new):
            # a token keeps its slot while held, so what is not new already lies where it should
            over = (..., *(None,) * (old.ndim - 2))
            at = (new.shape[1] - (position[:, None] - held))[over]
            if new.shape[1] > 1:
                new = jnp.take_along_axis(new, at.clip(0), 1, mode="clip")
            new = new.astype(old.dtype)
            return jnp.where(held[over] < 0, 0, jnp.where(at < 0, old, new))

        return jax.tree.map(update, old, new)

    def before(self, old: Any, start: jax.Array, few: int | None = None) -> Any:
        """The `window` tokens before the next, or the first few of them, in order [B, few, ...];
        anything where there are none, or they are sinks.

        old: arrays [B, slots, ...] as `keep` has them, or trees of them; start [B].
        """
        fixed, ring = self._parts
        place = start[:, None] - ring + jnp.arange(few or ring, dtype=jnp.int32)
        slot = fixed + (place - fixed) % ring
        pick = lambda a: jnp.take_along_axis(a, slot[(..., *(None,) * (a.ndim - 2))], 1)
        return jax.tree.map(pick, old)

    def leaving(self, old: Any, new: Any, start: jax.Array, position: jax.Array) -> tuple:
        """The token that each of T tokens takes the slot from, [B, T, ...], and whether there is
        one, [B, T]: nothing sees it from then on.

        old, new: as `keep` has them; start [B], position [B, T]: as `places` has them.
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


def _later(new: jax.Array, before: jax.Array) -> Pair:
    """[B, T, ...] behind the few tokens `before`, of which the last fall out, and these."""
    both, T = jnp.concatenate([before, new], 1), new.shape[1]
    return both[:, :T], both[:, T:]
