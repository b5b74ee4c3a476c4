"""The compiled programs of generation: read a chunk, read ragged ends, decode a block of steps.

Pure functions over flat parameters. Their shapes depend on the batch, the chunk and the block
alone, so a prompt and a generation of any length run the same few programs in the same memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.infer.sample import draw
from seqlab.models import depth
from seqlab.models.parameters import bind

Structure = Any  # jax.tree.structure(model): what a program is compiled for, beside shapes

RUNNING, STOPPED, NOT_FINITE = 0, 1, 2  # why a row of a batch takes no further step


class Carry(NamedTuple):
    """A batch of texts in progress: all that the next token depends on."""

    state: Any  # of the model after every token so far; leaves [repeats, B, ...]
    logits: jax.Array  # [B, V] float32, of the next token


class Steps(NamedTuple):
    """What a block of steps produced."""

    tokens: jax.Array  # [B, block] int32; a row's first `counts` are its own, the rest zero
    counts: jax.Array  # [B] int32
    finish: jax.Array  # [B] int32: RUNNING, STOPPED or NOT_FINITE


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_chunk(structure: Structure, params, carry: Carry, tokens, reset) -> Carry:
    """Prefill: tokens [B, T] int32, reset [B, T] bool -> the carry after them.

    Logits are computed for the last position alone.
    """
    model = _model(structure, params)
    x, state = model.hidden(tokens, carry.state, reset=reset)
    return Carry(state, model.logits(x[:, -1]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_steps(structure: Structure, params, carry: Carry, tokens, counts) -> Carry:
    """Prefill of ragged ends: row b reads the first counts[b] of tokens [B, T], one at a time."""
    model = _model(structure, params)
    step = lambda i, carry: _advance(model, carry, tokens[:, i], i < counts)
    return lax.fori_loop(0, counts.max(), step, carry)


@functools.partial(
    jax.jit, static_argnames=("structure", "top_k", "block"), donate_argnames="carry"
)
def decode(
    structure: Structure,
    params,
    carry: Carry,
    finish,
    limits,
    positions,
    keys,
    stop,
    numbers,
    *,
    top_k: int | None,
    block: int,
) -> tuple[Carry, Steps]:
    """Up to limits[b] <= block tokens for each row b, fewer where the row ends.

    finish, limits, positions [B] int32; keys [B]; stop [S] int32, the tokens that end a row;
    numbers and top_k as in `sample.draw`. A row's state is frozen at the last token it produced (a
    stop token counts). The token at position p is drawn with fold_in(key, p), p counted from the
    start of the row, so where blocks begin and end cannot be seen in the tokens.
    """
    model, (state, logits) = _model(structure, params), carry
    stacked, flat = model, jax.default_backend() == "cpu"
    if flat:
        model, state = depth.unstacked(model, state)
    carry, B = Carry(state, logits), limits.shape[0]

    def more(loop):
        i, _, steps = loop
        return (i < block) & jnp.any(running(i, steps.finish))

    def running(i, finish):
        return (i < limits) & (finish == RUNNING)

    def stopped(i, finish, logits):
        sound = jnp.isfinite(logits.max(-1))  # max is NaN if any logit is
        return jnp.where(running(i, finish) & ~sound, NOT_FINITE, finish)

    def step(loop):
        i, carry, (tokens, counts, finish) = loop
        active = running(i, finish)
        token = draw(
            carry.logits, jax.vmap(jax.random.fold_in)(keys, positions + i), numbers, top_k
        )
        token = jnp.where(active, token, 0)
        carry = _advance(model, carry, token, active)
        finish = jnp.where(active & jnp.isin(token, stop), STOPPED, finish)
        finish = stopped(i + 1, finish, carry.logits)
        return i + 1, carry, Steps(tokens.at[:, i].set(token), counts + active, finish)

    finish = stopped(0, finish, logits)
    nothing = Steps(jnp.zeros((B, block), jnp.int32), jnp.zeros(B, jnp.int32), finish)
    _, carry, steps = lax.while_loop(more, step, (jnp.int32(0), carry, nothing))
    state = depth.stacked(stacked, carry.state) if flat else carry.state
    return Carry(state, carry.logits), steps


def _model(structure: Structure, params) -> Any:
    return bind(structure.unflatten(range(structure.num_leaves)), params)


def _advance(model, carry: Carry, token, active) -> Carry:
    """One token [B] more for the active rows; the others stay as they are, bit for bit.

    One of them is active, or nobody would call: a single row is, and needs no second look.
    """
    x, state = model.hidden(token[:, None], carry.state)
    logits = model.logits(x[:, -1])
    if len(token) == 1:
        return Carry(state, logits)

    def rows(new, old):  # the batch is axis 1 of a state's leaves
        return jnp.where(active.reshape(1, -1, *(1,) * (new.ndim - 2)), new, old)

    state = jax.tree.map(rows, state, carry.state)
    return Carry(state, jnp.where(active[:, None], logits, carry.logits))
