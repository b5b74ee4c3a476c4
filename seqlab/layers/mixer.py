"""The one contract of the library: a token mixer.

    y, state = mixer(x, state, reset=reset)        for any T >= 1

x, y   [B, T, D]
state  a NamedTuple of arrays, batch first, float32 (or int, bool), whose shapes never depend on T:
       all that the mixer remembers of the current document
reset  [B, T] bool, true where a new document starts; what came before is forgotten there

The law: pieces equal the whole. Fed at once, cut anywhere, or token by token, the same y and the
same state come out. That one law is training, chunked prefill, constant-memory decoding and saved
sessions; `seqlab.check` holds every mixer to it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

State = Any


class Mixer(nnx.Module):
    """Authors write `init_state` and `mix`; callers call the mixer."""

    #: Longest document this mixer can hold in its state; None is no limit.
    max_length: int | None = None

    #: So many tokens at the start of a document see one another, so that they come in one call, and
    #: only where a document is beyond them may a call end and another go on; 0 for causal mixers.
    prefix: int = 0

    #: A mixer that shares defines `mix(x, state, reset, shared) -> y, state, shared` instead:
    #: `shared` [B, T, D] travels from block to block beside x (a model starts it with its
    #: embeddings), None where the mixer stands alone.
    shares: bool = False

    #: Which of its linear maps take over projections of softmax attention when the mixer takes its
    #: place, besides those that are called q, k, v and out: a `qkv` of (("q", 64), ("k", 64),
    #: ("v", 64)) has in its columns (rows for out) so many of each, in this order; one that comes
    #: again goes on where it ended. A width None is the whole map.
    projections: Mapping[str, tuple[tuple[str, int | None], ...]] = {}

    def __call__(
        self, x: jax.Array, state: State = None, *, reset: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        if state is None:
            state = self.init_state(x.shape[0])
        if reset is None:
            reset = jnp.zeros(x.shape[:2], bool)
        if self.shares:
            return self.mix(x, state, reset, None)[:2]
        return self.mix(x, state, reset)

    def init_state(self, batch: int) -> State:
        """The empty state for `batch` rows."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state(batch)")

    def mix(self, x: jax.Array, state: State, reset: jax.Array, *shared) -> tuple:
        """x [B, T, D], state, reset [B, T] -> y [B, T, D] in the dtype of x, state as it came."""
        raise NotImplementedError(f"{type(self).__name__} must define mix(x, state, reset)")
