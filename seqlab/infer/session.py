"""A session is a model and the state it is in: feed it, generate, fork it, save it, resume it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.errors import ConfigError, DataError, ModelError
from seqlab.infer import decode, prefill, prompt, state_file
from seqlab.infer.decode import Carry
from seqlab.infer.sample import GREEDY, Sampling, row_keys
from seqlab.layers.mixer import State
from seqlab.models.parameters import parameters

Finish = Literal["length", "stop", "nan"]
_FINISH: dict[int, Finish] = {
    decode.RUNNING: "length",
    decode.STOPPED: "stop",
    decode.NOT_FINITE: "nan",
}


class Block(NamedTuple):
    """Tokens as they come: row b produced the first counts[b] of tokens [B, n]; padding follows."""

    tokens: np.ndarray  # [B, n] int32
    counts: np.ndarray  # [B] int32


class Generation(NamedTuple):
    """Row b produced the first lengths[b] of its tokens; the rest is padding (see `generate`)."""

    tokens: np.ndarray  # [B, steps] int32
    lengths: np.ndarray  # [B] int32
    finish: tuple[Finish, ...]  # why each row ended; "nan": its logits were not finite


class Session:
    """A batch of texts that a model is reading and writing.

    Invariant: the state has taken in every token that was fed or returned, and no other. So a
    session can be fed, generated from, forked and saved in any order, between any two blocks.

    model       an `lm.LM`
    state       the state to start from, as a call of the model returned it (copied); None is empty.
                It does not say how many tokens led to it: give `position` for a model with a
                `max_length` or a `prefix`, and for sampled continuations to go on exactly.
    chunk_size  tokens of a prompt that are read at once: bounds the memory of prefill; a model's
                `prefix` is read in one piece whatever its length
    block       most tokens a row produces in one call of the compiled program
    """

    def __init__(
        self,
        model: Any,
        state: State = None,
        *,
        position: int | Sequence[int] = 0,
        chunk_size: int = 512,
        block: int = 64,
    ):
        if chunk_size < 1 or block < 1:
            raise ConfigError(f"chunk_size={chunk_size} and block={block} must be at least 1.")
        self.model = model
        self.chunk_size, self.block = min(chunk_size, model.max_length or chunk_size), block
        self._structure, self._params = jax.tree.structure(model), parameters(model)
        self._carry: Carry | None = None
        self._has_logits = False
        if state is not None:
            self._begin(_checked_state(model, state), position)

    @property
    def batch(self) -> int:
        """Rows of the session; 0 before it has read anything."""
        return 0 if self._carry is None else len(self.position)

    @property
    def state(self) -> State:
        """A copy of the model's state after every token so far."""
        return jax.tree.map(jnp.copy, self._started().state)

    @property
    def logits(self) -> np.ndarray:
        """[B, vocab] float32: the logits of the next token."""
        return np.asarray(self._started().logits)

    def feed(self, tokens: Any) -> None:
        """Read a prompt, or more of one: ids [T] or [B, T], a list of rows of any lengths, or an
        iterator of arrays of ids (one row, read piece by piece in constant memory).

        One row goes to every row of the session. Feeding a row that had ended takes it up again.
        Raises DataError for what is not token ids, ModelError past the model's `max_length`, and
        where a row stands within the model's `prefix`, which must come in one call.
        """
        vocab, prefix = self.model.config.vocab, 0 if self.batch else self.model.prefix
        if not prompt.is_stream(tokens):
            return self._read(prompt.rows_of(tokens, vocab))
        first, read = prefill.first_chunk(prefix, self.chunk_size), 0
        for piece in prompt.pieces(tokens, self.chunk_size, first):
            self._read([prompt.checked(piece, vocab, f"The prompt from token {read} on")])
            read += piece.size
        if not read:
            raise DataError("The prompt is empty: give at least one token.")

    def generate(
        self,
        steps: int | Sequence[int] | np.ndarray,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
        stop: int | Sequence[int] | None = None,
    ) -> Iterator[Block]:
        """Go on for up to `steps` tokens (or so many for each row), a block at a time.

        A row ends at a token of `stop`, which is its last, and produces no more until it is fed.
        Token p of row b is drawn with a key made of (seed, b, p) alone: neither the blocks, nor
        saving and resuming, nor the other rows change it. Raises ModelError, before the first
        block, where there is nothing to go on from, no room for `steps` tokens, or a row within the
        model's `prefix`.
        """
        carry = self._started()
        left = np.broadcast_to(np.asarray(steps, np.int32), self.batch)
        if left.min() < 0 or left.max() < 1:
            raise ConfigError(f"steps must be at least 1, not {steps}.")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed must be between 0 and 2**32 - 1, not {seed}.")
        ends = np.atleast_1d(np.asarray([] if stop is None else stop, np.int32))
        if ends.size:
            prompt.checked(ends, carry.logits.shape[1], "stop")
        left = np.where(self._finish, 0, left)
        self._require_room(self.position + left, "The text so far and the steps to come")
        self._require_whole_prefix(self.position[left > 0])
        return self._blocks(left, sampling, row_keys(seed, self.batch), ends)

    def complete(
        self,
        steps: int,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
        stop: int | Sequence[int] | None = None,
        stream: Callable[[Block], None] | None = None,
    ) -> Generation:
        """All blocks of `generate` together; `stream` is called with each as it comes."""
        pad = 0 if stop is None else int(np.atleast_1d(stop)[0])
        tokens = np.full((self.batch, steps), pad, np.int32)
        lengths = np.zeros(self.batch, np.int32)
        for block in self.generate(steps, sampling, seed=seed, stop=stop):
            for b, count in enumerate(block.counts):
                tokens[b, lengths[b] : lengths[b] + count] = block.tokens[b, :count]
            lengths += block.counts
            if stream is not None:
                stream(block)
        return Generation(tokens, lengths, self.finish)

    @property
    def finish(self) -> tuple[Finish, ...]:
        """For each row: "stop" or "nan" if it has ended, "length" if it can go on."""
        return tuple(_FINISH[int(code)] for code in self._finish)

    def fork(self, n: int = 1) -> "Session":
        """An independent session in which every row of this one stands `n` times in a row.

        Copies of a row draw different tokens, since they are different rows of their batch.
        """
        if n < 1:
            raise ConfigError(f"A session forks into at least 1 copy, not {n}.")
        carry, other = self._started(), copy.copy(self)
        state = jax.tree.map(lambda a: jnp.repeat(a, n, axis=1).copy(), carry.state)
        other._carry = Carry(state, jnp.repeat(carry.logits, n, axis=0).copy())
        other.position, other._finish = np.repeat(self.position, n), np.repeat(self._finish, n)
        return other

    def save(self, path: Any) -> None:
        """Write the session (not the model) to one safetensors file; it replaces `path` whole."""
        carry = self._started()
        state_file.write(path, self.model, carry, self.position, self._finish)

    @classmethod
    def load(cls, model: Any, path: Any, *, chunk_size: int = 512, block: int = 64) -> "Session":
        """The session that `save` wrote; it goes on bit for bit as if it had never stopped.

        Raises ModelError where the file is missing, damaged, no session, or of another model.
        """
        session = cls(model, chunk_size=chunk_size, block=block)
        session._carry, session.position, session._finish = state_file.read(path, model)
        session._has_logits = True
        return session

    def _begin(self, state: State, position: int | Sequence[int]) -> None:
        batch = max((leaf.shape[1] for leaf in jax.tree.leaves(state)), default=1)
        logits = jnp.zeros((batch, self.model.config.vocab), jnp.float32)
        self._carry = Carry(jax.tree.map(jnp.copy, state), logits)
        self.position = np.array(np.broadcast_to(np.asarray(position, np.int32), batch))
        self._finish = np.zeros(batch, np.int32)

    def _started(self) -> Carry:
        if self._carry is None or not self._has_logits:
            raise ModelError("The session has read nothing yet: feed it a prompt first.")
        return self._carry

    def _require_room(self, lengths: np.ndarray, what: str) -> None:
        limit, longest = self.model.max_length, int(lengths.max())
        if limit is not None and longest > limit:
            raise ModelError(
                f"{what} make {longest} tokens but the model's max_length is {limit}: shorten "
                "them, or build the model with a larger max_length."
            )

    def _require_whole_prefix(self, position: np.ndarray) -> None:
        within = position[(position > 0) & (position < self.model.prefix)]
        if within.size:
            raise ModelError(
                f"The prompt has {within[0]} tokens, fewer than the prefix of {self.model.prefix} "
                "that the model reads at once: give a longer one, or the same one as often as "
                "fills it (seqlab generate --read-twice)."
            )

    def _read(self, rows: list[np.ndarray]) -> None:
        rows = rows * self.batch if len(rows) == 1 and self.batch else rows
        if self.batch and len(rows) != self.batch:
            raise DataError(
                f"The prompt has {len(rows)} rows but the session holds {self.batch}: "
                "give one row for all, or one for each."
            )
        fresh = self.batch == 0
        position = np.zeros(len(rows), np.int32) if fresh else self.position
        position = position + np.array([row.size for row in rows], np.int32)
        self._require_room(position, "The prompt and what came before it")
        if fresh:
            self._begin(self.model.init_state(len(rows)), 0)
        self._require_whole_prefix(self.position)
        # Reading consumes the carry: a session whose feed is interrupted has nothing to go on from.
        carry, self._carry, self._has_logits = cast(Carry, self._carry), None, False
        program = (self._structure, self._params, carry, rows, self.chunk_size)
        if fresh:
            carry = prefill.from_empty(*program, self.model.prefix)
        else:
            carry = prefill.from_state(*program, self.block)
        self._carry, self._has_logits, self.position = carry, True, position
        self._finish = np.zeros(self.batch, np.int32)

    def _blocks(self, left, sampling: Sampling, keys, ends: np.ndarray) -> Iterator[Block]:
        while left.any():
            self._carry, steps = decode.decode(
                self._structure,
                self._params,
                self._started(),
                self._finish,
                np.minimum(left, self.block),
                self.position,
                keys,
                ends,
                sampling.numbers,
                top_k=sampling.top_k if sampling.numbers else None,
                block=self.block,
            )
            tokens, counts, self._finish = (np.array(a) for a in steps)
            self.position = self.position + counts
            left = np.where(self._finish, 0, left - counts)
            if counts.any():
                tokens = tokens[:, : counts.max()]
                if ends.size:
                    tokens[np.arange(tokens.shape[1]) >= counts[:, None]] = ends[0]
                yield Block(tokens, counts)


def _checked_state(model: Any, state: State) -> State:
    leaves = jax.tree.leaves(state)
    batch = leaves[0].shape[1] if leaves and np.ndim(leaves[0]) > 1 else 1
    wrong = state_file.mismatch(model, state, batch)
    if wrong:
        raise ModelError(f"The state does not fit the model: {wrong}. Use the model it came from.")
    return state
