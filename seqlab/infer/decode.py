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
    model = _model(structure, params)
    B = limits.shape[0]

    def more(loop):
        i, _, steps = loop
        return (i < block) & jnp.any((i < limits) & (steps.finish == RUNNING))

    def step(loop):
        i, carry, (tokens, counts, finish) = loop
        running = (i < limits) & (finish == RUNNING)
        sound = jnp.isfinite(carry.logits.max(-1))  # max is NaN if any logit is
        active = running & sound
        token = draw(
            carry.logits, jax.vmap(jax.random.fold_in)(keys, positions + i), numbers, top_k
        )
        token = jnp.where(active, token, 0)
        finish = jnp.where(active & jnp.isin(token, stop), STOPPED, finish)
        finish = jnp.where(running & ~sound, NOT_FINITE, finish)
        steps = Steps(tokens.at[:, i].set(token), counts + active, finish)
        return i + 1, _advance(model, carry, token, active), steps

    nothing = Steps(jnp.zeros((B, block), jnp.int32), jnp.zeros(B, jnp.int32), finish)
    _, carry, steps = lax.while_loop(more, step, (jnp.int32(0), carry, nothing))
    return carry, steps


def _model(structure: Structure, params) -> Any:
    return bind(structure.unflatten(range(structure.num_leaves)), params)


def _advance(model, carry: Carry, token, active) -> Carry:
    """One token [B] more for the active rows; the others stay as they are, bit for bit."""
    x, state = model.hidden(token[:, None], carry.state)

    def rows(new, old):  # the batch is axis 1 of a state's leaves
        return jnp.where(active.reshape(1, -1, *(1,) * (new.ndim - 2)), new, old)

    logits = jnp.where(active[:, None], model.logits(x[:, -1]), carry.logits)
    return Carry(jax.tree.map(rows, state, carry.state), logits)
