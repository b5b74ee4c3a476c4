"""The selective scan inside of a TPU: a token's decays and states exist in the vector memory alone.

The grid is (batch, chunks, blocks of channels). All channels take a chunk before the next chunk
comes, so that b, c and what is summed over channels stay where they are; the states [N, E] of all
channels, the decay rates A and their gradient stay for a whole sequence. Channels lie along lanes,
and a loop goes over tiles of 8 tokens. Equations are those of `token_by_token`.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels.on_tpu.tiles import LANES, column
from seqlab.kernels.precision import widen
from seqlab.kernels.tiles import rows_by_rows

SUBLANES = 8
#: The dt with which a document's first token decays what came before, to exactly 0; and the
#: weakest A, that changes no decay by itself.
FLUSH, WEAKEST = 1e30, -1e-20


def forward(u, dt, b, c, reset, A, initial, y, *rest, plan):
    *entering, state, decays, writes, read, b_spread, c_spread = rest
    here, rates = _channels(plan), _rates(A, plan)

    @pl.when(pl.program_id(1) == 0)
    def _():
        state[:, here] = initial[:, here]

    _spread((b, c), (b_spread, c_spread))
    _prepare(u, dt, reset, decays, writes, plan)
    for ref in entering:
        ref[...] = state[:, here]

    def group(at, h):
        d, w, parts = decays[at], writes[at], []
        for i in range(SUBLANES):
            h = _decay(d[i : i + 1], rates) * h + _wide(b_spread, at, i, plan) * w[i : i + 1]
            parts.append(_folded(h * _wide(c_spread, at, i, plan)))
        read[at] = _sums(parts)
        return h

    state[:, here] = _over_groups(group, state[:, here], plan)
    y[...] = read[...].astype(y.dtype)


def backward(*refs, plan):
    u, dt, b, c, reset, A, entering, dy, last, du, ddt, db, dc, dA, D, *scratch = refs
    decays, writes, dys, to_write, to_decay, b_spread, c_spread, b_sums, c_sums, states = scratch
    here, rates = _channels(plan), _rates(A, plan)

    @pl.when(pl.program_id(1) == 0)
    def _():
        D[:, here] = last[:, here]
        dA[:, here] = jnp.zeros_like(rates)

    @pl.when(pl.program_id(2) == 0)
    def _():
        b_sums[...] = jnp.zeros_like(b_sums)
        c_sums[...] = jnp.zeros_like(c_sums)

    _spread((b, c), (b_spread, c_spread))
    us, dts = _prepare(u, dt, reset, decays, writes, plan)
    dys[...] = _tokens(dy, plan)

    def again(at, h):
        d, w = decays[at], writes[at]
        for i in range(SUBLANES):
            states[at.start + i] = h
            h = _decay(d[i : i + 1], rates) * h + _wide(b_spread, at, i, plan) * w[i : i + 1]
        return h

    after = _over_groups(again, entering[...], plan)

    def group(at, carry):
        D, dA, after = carry
        d, w, dy = decays[at], writes[at], dys[at]
        reads, through = [], []  # from the last token on
        for i in reversed(range(SUBLANES)):
            t, d_t, dy_t = at.start + i, d[i : i + 1], dy[i : i + 1]
            D += _wide(c_spread, at, i, plan) * dy_t
            c_sums[t] += _over_lanes(after * dy_t)
            b_sums[t] += _over_lanes(D * w[i : i + 1])
            reads.append(_folded(D * _wide(b_spread, at, i, plan)))
            D *= _decay(d_t, rates)
            after = states[t]
            decayed = D * after
            through.append(_folded(decayed * rates))
            dA += decayed * d_t
        to_write[at], to_decay[at] = _sums(reads[::-1]), _sums(through[::-1])
        return D, dA, after

    carry = D[:, here], dA[:, here], after
    D[:, here], dA[:, here], _ = _over_groups(group, carry, plan, reverse=True)
    du[...] = (to_write[...] * dts).astype(du.dtype)
    ddt[...] = (to_decay[...] * math.log(2) + to_write[...] * us).astype(ddt.dtype)

    @pl.when(pl.program_id(2) == plan.grid[2] - 1)
    def _():
        for total, sums in ((db, b_sums), (dc, c_sums)):
            sums = sums[...].reshape(-1, LANES)
            total[...] = rows_by_rows(jnp.ones((1, LANES), sums.dtype), sums)


def _channels(plan):
    return pl.ds(pl.multiple_of(pl.program_id(2) * plan.width, LANES), plan.width)


def _rates(A, plan):
    """A of the block's channels, for powers of two."""
    return jnp.minimum(A[:, _channels(plan)], WEAKEST) / math.log(2)


def _decay(d, rates):
    return jnp.exp2(d * rates)


def _over_groups(step, carry, plan, reverse=False):
    """step(tokens, carry) for the tokens of one tile of float32 after the other."""
    groups = plan.size // SUBLANES

    def body(i, carry):
        g = groups - 1 - i if reverse else i
        return step(pl.ds(pl.multiple_of(g * SUBLANES, SUBLANES), SUBLANES), carry)

    return lax.fori_loop(0, groups, body, carry)


def _prepare(u, dt, reset, decays, writes, plan):
    """Fills dt, as it decays, and dt u; returns u and dt."""
    us, dts = _tokens(u, plan), _tokens(dt, plan)
    decays[...] = jnp.where(column(reset[...]) > 0, FLUSH, dts)
    writes[...] = dts * us
    return us, dts


def _tokens(ref, plan):
    """A block in float32: tokens beyond the last are zeros, which leave a state be."""
    x = widen(ref[...])
    if plan.T % plan.size == 0:
        return x
    token = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    left = plan.T - plan.time(pl.program_id(1)) * plan.size
    return jnp.where(token < left, x, 0)


def _spread(refs, spreads):
    """A chunk's [N, C] with a token's column along all lanes [C, N, LANES], once for all blocks."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, spread in zip(refs, spreads, strict=True):
            for t in range(ref.shape[1]):
                spread[t] = jnp.broadcast_to(ref[:, t : t + 1], spread.shape[1:])


def _wide(spread, at, i: int, plan):
    """Token i of a group, [N, LANES], for all channels of a block."""
    return jnp.concatenate([spread[at.start + i]] * (plan.width // LANES), 1)


def _over_lanes(x):
    """[N, width] -> [N, LANES], sums of the groups of lanes"""
    return sum((x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)), x[:, :LANES])


def _folded(x):
    """[N, width] -> [SUBLANES, width], sums of tiles"""
    return sum((x[i : i + SUBLANES] for i in range(SUBLANES, x.shape[0], SUBLANES)), x[:SUBLANES])


def _sums(parts):
    """Row i is the sum of the rows of parts[i]: each round adds every row of two parts to the one
    before it, and keeps every other sum of each."""
    row = lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    step = 1
    while len(parts) > 1:
        first = row & step == 0
        parts = [
            jnp.where(first, a, b) + pltpu.roll(jnp.where(first, b, a), step, 0)
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
        step *= 2
    return parts[0]
