"""A bank of memories, of which each chunk of tokens reads and writes one.

The chunks of `chunk_scan`, with a memory for each of several owners: tokens [B, T, ...] lie in
chunks whose tokens all have the same owner, and a state is [B, H, M, K, V].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels import chunk_scan


class Bank(NamedTuple):
    """A chunk of `chunk`'s kind whose first tokens, `owner` [B, C], say which memory is its own."""

    chunk: Any

    def forward(self, owner, *args):
        """*tokens, the memories that enter -> y, the memories that leave"""
        *tokens, memories = args
        y, after = self.chunk.forward(*tokens, read(memories, owner))
        return y, written(memories, owner, after)

    def keep(self, owner, *args):
        """What the backward pass needs of the memories that enter."""
        return read(args[-1], owner)

    def backward(self, owner, *args):
        """*tokens, the memory that enters, cotangents of y and of the memories that leave"""
        *known, cotangents = args
        *gradients, before = self.chunk.backward(*known, read(cotangents, owner))
        return None, *gradients, written(cotangents, owner, before)

    def transition(self, owner, tokens: tuple, memories: int, size: int):
        """What all the tokens do to each of so many memories, as one transition of them all."""
        # zeros leave a memory be: what a chunk of them does is what no token does
        more = lambda a: jnp.pad(a, [(0, 0), (0, size)] + [(0, 0)] * (a.ndim - 2))
        owner, *chunks = chunk_scan.cut(jax.tree.map(more, (owner, *tokens)), size)
        stretches = jax.vmap(self.chunk.transition)(*chunks)
        nothing = jax.tree.map(lambda a: jnp.repeat(a[-1][:, :, None], memories, 2), stretches)

        def add(all, xs):
            owner, later = xs
            after = jax.tree.map(lambda a: read(a, owner), all).then(later)
            return jax.tree.map(lambda a, b: written(a, owner, b), all, after), None

        return lax.scan(add, nothing, (owner, stretches))[0]


def read(memories: jax.Array, owner: jax.Array) -> jax.Array:
    """[B, H, M, ...], owner [B, C] -> [B, H, ...]"""
    return memories[jnp.arange(len(owner)), :, owner[:, 0]]


def written(memories: jax.Array, owner: jax.Array, new: jax.Array) -> jax.Array:
    """[B, H, M, ...] with `new` [B, H, ...] as the owner's."""
    return memories.at[jnp.arange(len(owner)), :, owner[:, 0]].set(new.astype(memories.dtype))
