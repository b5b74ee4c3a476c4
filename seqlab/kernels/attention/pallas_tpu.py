"""Softmax attention as a pair of TPU kernels, forward and backward: `xla`'s blocks.

The grid is (batch, key heads, blocks of queries) and, forward, groups of key blocks, which stay in
the vector memory for as long as consecutive steps ask for them. What is seen of a pair of blocks is
known before the kernel begins, so neither work nor memory is spent on pairs in which nothing is.
All arrays are turned, so that tokens lie along rows, which are whole however narrow a head is:

    q  [K, C]       y, dy  [V, C]       lse, position, document  [1, C]
    k  [K, D]       v      [V, D]       scores                   [D, C]
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ModelError
from seqlab.kernels.attention.visible import EMPTY, MASKED, visible, visible_blocks
from seqlab.kernels.attention.xla import (
    ALONE,
    Answered,
    Gradients,
    InXLA,
    Keys,
    Options,
    Queries,
    answered,
    as_keys,
    as_queries,
    blockwise,
)
from seqlab.kernels.on_tpu.call import VMEM, call
from seqlab.kernels.on_tpu.tiles import LANES, column
from seqlab.kernels.platforms import Forms
from seqlab.kernels.precision import widen
from seqlab.kernels.tiles import columns_by_columns, product, rows_by_rows

WIDTH = 16  # what keys and values are a multiple of: rows of a bfloat16 tile
PAIRS = 2**16  # of blocks, for each of which there is one number in a memory of 1 MiB at most


def by_platform(q, k, *arrays, **options):
    """The kernels where it is lowered for a TPU, if they suit, and `xla` elsewhere."""

    def forms(options, queries, keys):
        in_xla = InXLA(options, ALONE)
        on_tpu = OnTPU(options, q.shape[2] // k.shape[2])
        return Forms(in_xla, on_tpu) if suits(queries, keys) else Forms(in_xla)

    return blockwise(q, k, *arrays, forms=forms, **options)


def kernel(q, k, *arrays, interpret: Any = False, **options):
    """The same of the kernels alone; `pltpu.InterpretParams()` runs them on any machine."""

    def forms(options, queries, keys):
        if not suits(queries, keys):
            raise ModelError(
                "The TPU kernel of attention takes queries, keys and values of one dtype, of a "
                f"width that is a multiple of {WIDTH}, and whole blocks of {LANES} tokens, not "
                f"{q.dtype}{list(q.shape)} and {k.dtype}{list(k.shape)}: leave the implementation "
                "to None."
            )
        return Forms(OnTPU(options, q.shape[2] // k.shape[2], interpret))

    return blockwise(q, k, *arrays, forms=forms, **options)


def suits(queries: Queries | Answered, keys: Keys) -> bool:
    """Whether the kernels can do these blocks: of what they cannot, XLA makes its own."""
    (N, _, _, C, K), (M, _, _, D, V) = queries.q.shape, keys.v.shape
    whole = C % LANES == 0 and D % LANES == 0 and K % WIDTH == 0 and V % WIDTH == 0
    return whole and N * M <= PAIRS and queries.q.dtype == keys.k.dtype == keys.v.dtype


class OnTPU(NamedTuple):
    """The kernels as a form of `Forms`; `heads` share a key, on which only the cost depends."""

    options: Options
    heads: int = 1
    interpret: Any = False

    def forward(self, queries: Queries, keys: Keys, past: None):
        """y and log-sum-exp."""
        return self.see(queries, keys, queries.q.dtype)

    def backward(self, queries: Queries, keys: Keys, past: None, y, lse, dy, dlse):
        """Cotangents of queries and keys."""
        d = self.pull(answered(queries, y, lse, dy, dlse), keys, rounded=True)
        return as_queries(d.q_turned.mT, queries), as_keys(d.k, d.v, keys), None

    def see(self, queries: Queries, keys: Keys, dtype):
        """y, in that dtype, and log-sum-exp."""
        blocks, V, wide = self._blocks(queries, keys), keys.v.shape[-1], widen(queries.q).dtype
        y, lse = blocks.call(
            _forward_kernel,
            _seen,
            (queries, keys),
            [blocks.rows(V, dtype), blocks.rows(1, wide)],
            scratch=[jax.ShapeDtypeStruct((X, blocks.C), wide) for X in (V, 1, 1)],
        )
        return y.mT, lse[..., 0, :]

    def pull(self, done: Answered, keys: Keys, rounded: bool = False) -> Gradients:
        """What these keys add to the gradients of queries, and get; `rounded` to what the tokens
        are where nothing is added to it. Sums of a group of keys stay in the vector memory while
        all queries meet it: one group after the other, and what queries get of each is added."""
        wide, K = widen(done.q).dtype, done.q.shape[-1]
        more = [done.lse[..., None, :], done.offset[..., None, :], done.dy.mT]
        parts = self._blocks(done, keys).parts(keys)
        few, found = (lambda a: a.dtype if rounded else wide), []
        for part in parts:
            blocks = self._blocks(done, part)
            of_queries = blocks.rows(K, few(done.q) if len(parts) == 1 else wide)
            of_keys = [blocks.columns(a.shape[-1], few(a)) for a in part[:2]]
            sums = [jax.ShapeDtypeStruct((K, blocks.C), wide)]
            sums += [jax.ShapeDtypeStruct((blocks.size, *a.shape[3:]), wide) for a, _ in of_keys]
            outputs, work = [of_queries, *of_keys], (_backward_kernel, _pulled)
            found.append(blocks.call(*work, (done, part), outputs, more, scratch=sums))
        dq, dk, dv = zip(*found, strict=True)
        dk, dv = (jnp.concatenate(a).mT for a in (dk, dv))
        return Gradients(functools.reduce(jnp.add, dq), dk, dv)

    def _blocks(self, queries: Queries | Answered, keys: Keys) -> "_Blocks":
        (N, B, G, C, K), (M, _, _, D, V) = queries.q.shape, keys.v.shape
        few, wide = (a.dtype.itemsize for a in (queries.q, widen(queries.q)))
        one = D * (K + V) * (4 * few + wide)  # keys, values and cotangents, each twice, and sums
        groups = -(-M // max(VMEM // 2 // one, 1))
        return _Blocks(self, N, B, G, C, M, D, -(-M // groups))


class _Blocks(NamedTuple):
    """How arrays lie, and the groups of key blocks of which one at a time is in vector memory."""

    form: OnTPU
    N: int
    B: int
    G: int
    C: int
    M: int
    D: int
    size: int  # of a group, in blocks

    @property
    def groups(self) -> int:
        return -(-self.M // self.size)

    def parts(self, keys: Keys) -> list[Keys]:
        """The groups, one by one."""
        cuts = range(0, self.M, self.size)
        here = lambda n: slice(n, n + self.size)
        return [Keys(keys.k[here(n)], keys.v[here(n)], keys.at[:, here(n)]) for n in cuts]

    def rows(self, X: int, dtype) -> tuple:
        """What has X numbers a query, [N, B, G, X, C], and a block of it."""
        index = lambda b, g, i, s, *_: (i, b, g, 0, 0)
        shape = jax.ShapeDtypeStruct((self.N, self.B, self.G, X, self.C), dtype)
        return shape, pl.BlockSpec((None, None, None, X, self.C), index)

    def columns(self, X: int, dtype) -> tuple:
        """What has X numbers a key, [M, B, G, X, D], and a group of blocks of it."""
        index = lambda b, g, i, s, kinds, held: (held[i * self.groups + s], b, g, 0, 0)
        shape = jax.ShapeDtypeStruct((self.M, self.B, self.G, X, self.D), dtype)
        return shape, pl.BlockSpec((self.size, None, None, X, self.D), index)

    def call(self, kernel, once, tokens: tuple, outputs, more=(), *, scratch):
        """Of `more` arrays like those of `rows`. The work on a pair of blocks, `once`, takes what
        the kernel does, or also what is in `scratch`."""
        (queries, keys), options, groups = tokens, self.form.options, self.groups
        q_at = pl.BlockSpec((2, None, None, 1, self.C), lambda b, g, i, s, *_: (0, i, b, 0, 0))
        k_at = pl.BlockSpec(
            (2, self.size, None, 1, self.D),
            lambda b, g, i, s, kinds, held: (0, held[i * groups + s], b, 0, 0),
        )
        by_query, by_key = [queries.q.mT, *more], [keys.k.mT, keys.v.mT]
        inputs = [(queries.at[..., None, :], q_at), (keys.at[..., None, :], k_at)]
        inputs += [(a, self.rows(a.shape[3], a.dtype)[1]) for a in by_query]
        inputs += [(a, self.columns(a.shape[3], a.dtype)[1]) for a in by_key]
        tiles = [jax.ShapeDtypeStruct(a.shape[3:], a.dtype) for a in (*by_query, *by_key)]
        return call(
            functools.partial(kernel, options=options),
            (self.B, self.G, self.N, groups),
            inputs,
            outputs,
            [pltpu.VMEM(a.shape, a.dtype) for a in scratch],
            self._kinds(queries, keys),
            semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            cost=(
                functools.partial(once, options),
                tiles + ([] if more else scratch),
                self.B * self.G * self._pairs(),
            ),
            name=f"attention{kernel.__name__.removesuffix('_kernel')}",
            interpret=self.form.interpret,
        )

    def _kinds(self, queries, keys):
        """Of each pair of blocks 0 where nothing is seen, 1 where something is, 2 where everything;
        and for each step the group of key blocks that is there."""
        some, every = visible_blocks(queries.at, keys.at, **self.form.options.sight)
        kinds = some.astype(jnp.int32) + every
        kinds = jnp.pad(kinds, [(0, 0), (0, self.groups * self.size - self.M)])
        kinds = kinds.reshape(self.N * self.groups, self.size)
        step = jnp.arange(len(kinds), dtype=jnp.int32)
        last = lax.cummax(jnp.where(kinds.any(1), step, 0))
        return kinds.reshape(-1), last % self.groups

    def _pairs(self) -> int:
        """How many pairs of blocks there are in one document from its first token on."""
        (window, _, _, causal, _), rows = self.form.options, self.C // self.form.heads
        first = lambda i: 0 if window is None else max(i * rows - window + 1, 0) // self.D
        end = lambda i: (i * rows + rows - 1) // self.D + 1 if causal else self.M
        return sum(min(end(i), self.M) - min(first(i), self.M) for i in range(self.N))


# ---- kernels ----


def _forward_kernel(kinds, held, q_at, k_at, q, k, v, y, lse, seen, top, total, *, options):
    group, groups = pl.program_id(3), pl.num_programs(3)

    @pl.when(group == 0)
    def _():
        seen[...], total[...] = jnp.zeros_like(seen), jnp.zeros_like(total)
        top[...] = jnp.full_like(top, EMPTY)

    def pair(n, sees):
        here = q[...], k[n], v[n], seen[...], top[...], total[...]
        seen[...], top[...], total[...] = _seen(options, *here, sees)

    _each_pair(kinds, q_at, k_at, options, pair)

    @pl.when(group == groups - 1)
    def _():
        whole = jnp.where(total[...] > 0, total[...], 1)
        y[...] = (seen[...] / whole).astype(y.dtype)
        lse[...] = top[...] + jnp.log(whole)


def _backward_kernel(
    kinds, held, q_at, k_at, q, lse, offset, dy, k, v, dq, dk, dv, q_sum, k_sum, v_sum, *, options
):
    block, blocks = pl.program_id(2), pl.num_programs(2)
    q_sum[...] = jnp.zeros_like(q_sum)

    @pl.when(block == 0)
    def _():
        k_sum[...], v_sum[...] = jnp.zeros_like(k_sum), jnp.zeros_like(v_sum)

    def pair(n, sees):
        here = q[...], lse[...], offset[...], dy[...], k[n], v[n]
        to_q, to_k, to_v = _pulled(options, *here, sees)
        q_sum[...] += to_q
        k_sum[n] += to_k
        v_sum[n] += to_v

    _each_pair(kinds, q_at, k_at, options, pair)
    dq[...] = q_sum[...].astype(dq.dtype)

    @pl.when(block == blocks - 1)
    def _():
        dk[...], dv[...] = k_sum[...].astype(dk.dtype), v_sum[...].astype(dv.dtype)


def _each_pair(kinds, q_at, k_at, options: Options, pair):
    """pair(n, sees) for the key blocks n here in which something is seen; `sees` is None where
    everything is."""
    step, size = pl.program_id(2) * pl.num_programs(3) + pl.program_id(3), k_at.shape[1]

    def each(n, _):
        kind = kinds[step * size + n]
        pl.when(kind == 2)(lambda: pair(n, None))

        @pl.when(kind == 1)
        def _():
            position, document = (column(k_at[axis, n]) for axis in (0, 1))
            pair(n, visible(q_at[0], q_at[1], position, document, **options.sight))

    lax.fori_loop(0, size, each, None)


def _seen(options: Options, q, k, v, seen, top, total, sees=None):
    """What a block of queries has seen, and a block of keys too."""
    scores = _masked(options.scores(columns_by_columns(k, q)), sees)
    highest = jnp.maximum(top, jnp.max(scores, 0, keepdims=True))
    weights, shrink = jnp.exp(scores - highest), jnp.exp(top - highest)
    total = shrink * total + jnp.sum(weights, 0, keepdims=True)
    return shrink * seen + product(v, weights.astype(v.dtype)), highest, total


def _pulled(options: Options, q, lse, offset, dy, k, v, sees=None):
    """What a pair of blocks adds to the cotangents of its queries, keys and values."""
    scores = options.scores(columns_by_columns(k, q))
    weights = jnp.exp(_masked(scores, sees) - lse)
    d_scores = weights * (columns_by_columns(v, dy) - offset) * options.slope(scores)
    d_scores, weights = d_scores.astype(q.dtype), weights.astype(dy.dtype)
    return product(k, d_scores), rows_by_rows(q, d_scores), rows_by_rows(dy, weights)


def _masked(scores, sees):
    return scores if sees is None else jnp.where(sees, scores, MASKED)
