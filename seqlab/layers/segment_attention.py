"""Softmax attention inside segments, over tokens and a context made for each of them: what Titans
with memory as a context attends to (Behrouz, Zhong & Mirrokni, 2024, section 4.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.kernels.attention import attention_with_lse
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.rope import rope
from seqlab.layers.window_attention import Persistent


class State(NamedTuple):
    """The keys and values of the segment so far, of its context and of its tokens."""

    k: jax.Array  # [B, C, 2, H, K] float32, rotated; 0 where there is no token yet
    v: jax.Array  # [B, C, 2, H, K] float32


class SegmentAttention(nnx.Module):
    """Token i of a segment sees the persistent tokens, the tokens up to itself, and their contexts
    h_j, j <= i. In the paper it sees those of the whole segment, which are made of later tokens.

    A token and its context stand at the same place of the segment; the persistent tokens, nowhere.
    """

    def __init__(self, heads: int, persistent: int, rope_base, d_model: int, *, rngs: nnx.Rngs):
        self.heads, self.rope_base = heads, rope_base
        self.q, self.k, self.v = (
            Linear(d_model, d_model, ("embed", "heads"), rngs=rngs) for _ in "qkv"
        )
        self.persistent = Persistent(persistent, d_model, rngs=rngs)

    def init_state(self, batch: int, size: int) -> State:
        d_model = self.q.weight.shape[1]
        shape = batch, size, 2, self.heads, d_model // self.heads
        return State(*(jnp.zeros(shape, jnp.float32) for _ in "kv"))

    def __call__(self, x, context, place, valid, state: State) -> tuple[jax.Array, State]:
        """x, context -> y [B, T, D]; place [B, T] in the segment. No segment but the first goes on
        in these tokens, and where not `valid` [B, T], from some token on, there are none."""
        turned = lambda a: a if self.rope_base is None else rope(a, place, self.rope_base)
        both = lambda f: jnp.stack([f(context), f(x)], 2)  # [B, T, 2, H, K]
        q = heads(self.q(x), self.heads)
        k = both(lambda a: turned(heads(self.k(a), self.heads)))
        v = both(lambda a: heads(self.v(a), self.heads))
        number = jnp.cumsum((place == 0) & valid, 1, dtype=jnp.int32)  # 0 goes on in x
        slot = jnp.broadcast_to(jnp.arange(state.k.shape[1], dtype=jnp.int32), state.k.shape[:2])
        held = jnp.where(slot < place[:, :1], 0, -1)  # the segment of what is in each slot
        flat = lambda a: a.reshape(a.shape[0], -1, *a.shape[3:])
        twice = lambda a: jnp.repeat(a, 2, 1)
        seen = attention_with_lse(
            *(turned(q), flat(k), flat(v), place, number),
            *(twice(place), twice(jnp.where(valid, number, -1))),
            past=(flat(state.k), flat(state.v), twice(slot), twice(held)),
            implementation="reference",  # of a segment, all scores at once
        )
        y = merge(self.persistent(*seen, q, self.k, self.v))
        return y, State(
            *(_kept(old, new, place, valid) for old, new in zip(state, (k, v), strict=True))
        )


def _kept(old, new, place, valid):
    """The slots [B, C, ...] after tokens [B, T, ...]: of the last segment, each token in its place,
    and as they were for a row without tokens."""
    last = jnp.sum(valid, 1, keepdims=True) - 1  # [B, 1]
    reached = jnp.take_along_axis(place, jnp.maximum(last, 0), 1)
    slot = jnp.arange(old.shape[1])
    source = last - (reached - slot)  # [B, C] which of the tokens is in each slot
    over = lambda a: a[..., None, None, None]
    written = jnp.take_along_axis(new, over(jnp.maximum(source, 0)), 1, mode="clip")
    kept = jnp.where(over(source >= 0), written.astype(old.dtype), old)
    return jnp.where(over(last < 0), old, jnp.where(over(slot > reached), 0, kept))
