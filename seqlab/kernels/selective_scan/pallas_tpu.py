"""The selective scan as a pair of TPU kernels: decays and states of a token exist in the vector
memory alone.

The grid is (batch, chunks, blocks of channels). All channels take a chunk before the next chunk
comes, so that b, c and what is summed over channels stay where they are; the states [N, E] of all
channels, the decay rates A and their gradient stay for a whole sequence. Channels lie along lanes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.on_tpu.call import VMEM, call
from seqlab.kernels.on_tpu.layout import LANES, shapes
from seqlab.kernels.on_tpu.tiles import column, rows_by_rows
from seqlab.kernels.precision import widen
from seqlab.kernels.selective_scan import xla

WIDEST = 512  # channels of a block
ROWS, SUBLANES = 16, 8  # of a tile of bfloat16 and of float32
#: The dt with which a document's first token decays what came before, to exactly 0; and the
#: weakest A, that changes no decay by itself.
FLUSH, WEAKEST = 1e30, -1e-20


def chunked(u, dt, b, c, reset, A, state, *, chunk_size: int = 64, interpret: Any = False):
    """The definition's arguments and results; `pltpu.InterpretParams()` runs it on any machine."""
    tokens = xla.prepared(u, dt, b, c, reset, A)
    if not suits(tokens, chunk_size):
        raise ModelError(
            f"The TPU kernel of selective_scan takes channels by {LANES}, states by {SUBLANES} and "
            f"chunks by {ROWS} as the vector memory holds them, not E, N = {A.shape} and "
            f"chunk_size={chunk_size}: leave the implementation to None."
        )
    y, state = platforms.scan(platforms.Forms(OnTPU(chunk_size, interpret)), tokens, state.mT)
    return y, state.mT


def by_platform(u, dt, b, c, reset, A, state, *, chunk_size: int = 64):
    """The kernels where it is lowered for a TPU, if they suit, and `xla` elsewhere."""
    tokens = xla.prepared(u, dt, b, c, reset, A)
    on_tpu = OnTPU(chunk_size) if suits(tokens, chunk_size) else None
    y, state = platforms.scan(platforms.Forms(xla.form(u, chunk_size), on_tpu), tokens, state.mT)
    return y, state.mT


def suits(tokens, chunk_size: int) -> bool:
    """Whether the kernels can run them."""
    u, A = tokens[0], tokens[-1]
    (T, E), N = u.shape[1:], A.shape[0]
    if E % LANES or N % SUBLANES or (chunk_size < T and chunk_size % ROWS):
        return False
    return Plan.of(u, A, chunk_size, backward=True).memory <= VMEM


class OnTPU(NamedTuple):
    """The kernels as a form of `platforms.scan`."""

    chunk_size: int
    interpret: Any = False

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def _forward(self, tokens, state, keep: bool):
        u, A = tokens[0], tokens[-1]
        plan = Plan.of(u, A, self.chunk_size, backward=False)
        _, states = plan.states(state.dtype)
        y, *entering, last = call(
            functools.partial(_forward_kernel, plan=plan),
            plan.grid,
            [*plan.laid(tokens), (state, states)],
            [plan.to_lay(u), *([plan.kept(state.dtype)] if keep else []), plan.states(state.dtype)],
            [*plan.rows(3, state.dtype), *plan.spread(2, state.dtype)],
            semantics=SEMANTICS,
            cost=plan.cost(1, state.dtype),
            name="selective_scan_forward",
            interpret=self.interpret,
        )
        return (y[:, : u.shape[1]], last), (entering[0] if keep else None)

    def backward(self, tokens, entering, d_y, d_state):
        u, dt, b, c, _, A = tokens
        plan, dtype = Plan.of(u, A, self.chunk_size, backward=True), d_state.dtype
        kept, states = plan.kept(dtype), plan.states(dtype)
        du, ddt, db, dc, dA, d_first = call(
            functools.partial(_backward_kernel, plan=plan),
            plan.grid,
            [*plan.laid(tokens), (entering, kept[1]), *plan.laid([d_y]), (d_state, states[1])],
            [plan.to_lay(u), plan.to_lay(dt), *[plan.sums(dtype)] * 2, states, states],
            [
                *plan.rows(5, dtype),
                *plan.spread(4, dtype),
                pltpu.VMEM((plan.size, plan.N, plan.width), dtype),
            ],
            semantics=SEMANTICS,
            cost=plan.cost(2, dtype),
            name="selective_scan_backward",
            interpret=self.interpret,
        )
        cut = lambda d, a: d[:, : a.shape[1]].astype(a.dtype)
        d_each = (d.reshape(plan.B, -1, plan.N) for d in (db, dc))
        db, dc = map(cut, d_each, (b, c))
        return (cut(du, u), cut(ddt, dt), db, dc, None, jnp.sum(dA, 0)), d_first


SEMANTICS = ("parallel", "arbitrary", "arbitrary")


class Plan(NamedTuple):
    """How B sequences of T tokens in E channels of N states are cut, and how they lie."""

    B: int
    T: int
    E: int
    N: int
    size: int  # tokens of a chunk
    width: int  # channels of a block
    backward: bool

    @classmethod
    def of(cls, u, A, chunk_size: int, backward: bool) -> "Plan":
        B, T, E = u.shape
        width = next(w for w in (WIDEST, WIDEST // 2, LANES) if E % w == 0)
        size = chunk_size if chunk_size < T else -(-T // ROWS) * ROWS
        return cls(B, T, E, A.shape[0], size, width, backward)

    @property
    def chunks(self) -> int:
        return -(-self.T // self.size)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.B, self.chunks, self.E // self.width

    @property
    def memory(self) -> int:
        """Bytes of the vector memory, about, for the backward pass in float32."""
        block, states = self.size * self.width, self.N * self.E
        spread = 4 * self.size * self.N * LANES
        return 4 * (15 * block + self.N * block + spread + 9 * states)

    def time(self, chunk):
        return self.chunks - 1 - chunk if self.backward else chunk

    def laid(self, tokens) -> list:
        """Each as it lies, and the block of it that a step takes."""
        return [(self._laid(a), self._block(a)) for a in tokens]

    def to_lay(self, a) -> tuple:
        """The same of a result that is still to be made."""
        [shape] = shapes([jax.eval_shape(self._laid, a)])
        return shape, self._block(a)

    def states(self, dtype) -> tuple:
        """States of all channels, which stay for all chunks."""
        shape = jax.ShapeDtypeStruct((self.B, self.N, self.E), dtype)
        return shape, pl.BlockSpec((None, self.N, self.E), lambda b, c, e: (b, 0, 0))

    def kept(self, dtype) -> tuple:
        """The states that enter the chunks."""
        shape = jax.ShapeDtypeStruct((self.chunks, self.B, self.N, self.E), dtype)
        index = lambda b, c, e: (self.time(c), b, 0, e)
        return shape, pl.BlockSpec((None, None, self.N, self.width), index)

    def sums(self, dtype) -> tuple:
        """A chunk's sums over channels: N numbers a token, one token after the other."""
        row = 1, self.size * self.N
        shape = jax.ShapeDtypeStruct((self.B, self.chunks, *row), dtype)
        return shape, pl.BlockSpec((None, None, *row), lambda b, c, e: (b, self.time(c), 0, 0))

    def rows(self, count: int, dtype) -> list:
        """Room for a row a token."""
        return [pltpu.VMEM((self.size, self.width), dtype)] * count

    def spread(self, count: int, dtype) -> list:
        """Room for what a token has for all channels, or adds up over them."""
        return [pltpu.VMEM((self.size, self.N, LANES), dtype)] * count

    def cost(self, passes: int, dtype) -> tuple:
        """One exponential a state, a token and a pass."""
        decays = jax.ShapeDtypeStruct((passes * self.size, self.N, self.E), dtype)
        return jnp.exp, [decays], self.B * self.chunks

    def _laid(self, a):
        if a.ndim == 2 and a.dtype != bool:
            return a
        if a.ndim == 2:
            a = a[..., None].astype(jnp.float32)
        if a.shape[2] == self.E:
            return jnp.pad(a, [(0, 0), (0, max(0, self.size - self.T)), (0, 0)])  # a block at least
        a = jnp.pad(widen(a), [(0, 0), (0, -self.T % self.size), (0, 0)])
        return a.reshape(self.B, self.chunks, self.size, -1).mT

    def _block(self, a) -> pl.BlockSpec:
        if a.ndim == 2 and a.dtype != bool:
            return pl.BlockSpec(a.shape, lambda b, c, e: (0, 0))
        if a.ndim == 3 and a.shape[2] == self.E:
            return pl.BlockSpec((None, self.size, self.width), lambda b, c, e: (b, self.time(c), e))
        rows = 1 if a.ndim == 2 else self.N
        return pl.BlockSpec((None, None, rows, self.size), lambda b, c, e: (b, self.time(c), 0, 0))


# ---- kernels ----


def _forward_kernel(u, dt, b, c, reset, A, initial, y, *rest, plan: Plan):
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


def _backward_kernel(*refs, plan: Plan):
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
        reads, through = [None] * SUBLANES, [None] * SUBLANES
        for i in reversed(range(SUBLANES)):
            t, d_t, dy_t = at.start + i, d[i : i + 1], dy[i : i + 1]
            D += _wide(c_spread, at, i, plan) * dy_t
            c_sums[t] += _over_lanes(after * dy_t)
            b_sums[t] += _over_lanes(D * w[i : i + 1])
            reads[i] = _folded(D * _wide(b_spread, at, i, plan))
            D *= _decay(d_t, rates)
            after = states[t]
            decayed = D * after
            through[i] = _folded(decayed * rates)
            dA += decayed * d_t
        to_write[at], to_decay[at] = _sums(reads), _sums(through)
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


def _channels(plan: Plan):
    return pl.ds(pl.multiple_of(pl.program_id(2) * plan.width, LANES), plan.width)


def _rates(A, plan: Plan):
    """A of the block's channels, for powers of two."""
    return jnp.minimum(A[:, _channels(plan)], WEAKEST) / math.log(2)


def _decay(d, rates):
    return jnp.exp2(d * rates)


def _over_groups(step, carry, plan: Plan, reverse=False):
    """step(tokens, carry) for the tokens of one tile of float32 after the other."""
    groups = plan.size // SUBLANES

    def body(i, carry):
        g = groups - 1 - i if reverse else i
        return step(pl.ds(pl.multiple_of(g * SUBLANES, SUBLANES), SUBLANES), carry)

    return lax.fori_loop(0, groups, body, carry)


def _prepare(u, dt, reset, decays, writes, plan: Plan):
    """Fills dt, as it decays, and dt u; returns u and dt."""
    us, dts = _tokens(u, plan), _tokens(dt, plan)
    decays[...] = jnp.where(column(reset[...]) > 0, FLUSH, dts)
    writes[...] = dts * us
    return us, dts


def _tokens(ref, plan: Plan):
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


def _wide(spread, at, i: int, plan: Plan):
    """Token i of a group, [N, LANES], for all channels of a block."""
    return jnp.concatenate([spread[at.start + i]] * (plan.width // LANES), 1)


def _over_lanes(x):
    """[N, width] -> [N, LANES], sums of the groups of lanes"""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def _folded(x):
    """[N, width] -> [SUBLANES, width], sums of tiles"""
    return sum(x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES))


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
