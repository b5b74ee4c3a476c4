"""Tokens read in chunks, in memory that does not grow: what a model says at every one of them."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqlab.errors import ModelError
from seqlab.models.parameters import bind, parameters

LOGITS = 2**26  # numbers in the logits of a chunk, at most: 256 MB
LONGEST, SHORTEST = 512, 16  # tokens of a row that are read at once


class Chunk(NamedTuple):
    """The next tokens of some rows, all [B, T]; `targets` is what is to be said at each, and
    negative where nothing is."""

    tokens: np.ndarray
    targets: np.ndarray
    reset: np.ndarray  # where a document begins, and at all padding


def chunks(tokens: np.ndarray, targets: np.ndarray, size: int) -> Iterator[Chunk]:
    """Rows [B, L] of which each is a document, or the beginning of one, in chunks of `size`."""
    rows, length = tokens.shape
    width = -(-length // size) * size
    more = ((0, 0), (0, width - length))
    tokens, targets = np.pad(tokens, more), np.pad(targets, more, constant_values=-1)
    reset = np.broadcast_to(np.arange(width) >= length, tokens.shape)
    for at in range(0, width, size):
        part = slice(at, at + size)
        yield Chunk(tokens[:, part], targets[:, part], reset[:, part])


class Said(NamedTuple):
    """What a model says at the tokens of a chunk, [B, T]."""

    nats: np.ndarray  # minus the log-probability of the target, float32
    likeliest: np.ndarray  # int32


class Reader:
    """Reads rows from an empty state on, a chunk at a time."""

    def __init__(self, model: Any):
        self.model = model
        self._structure, self._params = jax.tree.structure(model), parameters(model)

    def chunk_size(self, rows: int, length: int) -> int:
        """Tokens to read at once of so many rows of this length: a power of two, or the model's
        prefix where that is longer."""
        most = max(SHORTEST, LOGITS // (rows * self.model.config.vocab))
        most = min(most, LONGEST, self.model.max_length or LONGEST, 2 * length - 1)
        least = min(SHORTEST, self.model.max_length or SHORTEST)
        return max(1 << (most.bit_length() - 1), least, self.model.prefix)

    def read(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Said]]:
        """What is said of one chunk while the device works on the next.

        Raises ModelError where it is not a number.
        """
        state, before = None, None
        for chunk in chunks:
            if state is None:
                state = self.model.init_state(len(chunk.tokens))
            state, said = _read(self._structure, self._params, state, *chunk)
            if before is not None:
                yield before[0], _arrived(before[1])
            before = chunk, said
        if before is not None:
            yield before[0], _arrived(before[1])

    def require_no_prefix(self) -> None:
        """Raises ModelError for a model that sees within its prefix what it is to predict."""
        if self.model.prefix:
            raise ModelError(
                f"The first {self.model.prefix} tokens that this model reads see one another, so "
                "what it says of the next one there is no prediction: measure it on a task, or by "
                "the held-out loss of its training."
            )

    def require_room(self, length: int, what: str, remedy: str) -> None:
        """Raises ModelError where a document of `length` tokens is longer than the model holds."""
        limit = self.model.max_length
        if limit is not None and length > limit:
            raise ModelError(
                f"{what} has {length} tokens and the model's max_length is {limit}: {remedy}."
            )


def _arrived(said: tuple[jax.Array, jax.Array]) -> Said:
    arrays = Said(*map(np.asarray, said))
    if np.isnan(arrays.nats).any():
        raise ModelError("The model's logits are not numbers: its weights are damaged.")
    return arrays


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(structure, params, state, tokens, targets, reset):
    model = bind(structure.unflatten(range(structure.num_leaves)), params)
    logits, state = model(tokens, state, reset=reset)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return state, (nats, jnp.argmax(logits, -1).astype(jnp.int32))
