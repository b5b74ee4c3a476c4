"""The scan over chunks as a pair of TPU kernels, forward and backward, for any family.

The grid is (batch, groups of heads, chunks, heads of a group): chunks follow one another, so a
state stays in the vector memory from the first to the last, and keys that the heads of a group
share are fetched once for all of them. Arrays lie as they come: a token's heads one beside the
other, of which a step takes as many as fill a row of 128 numbers. Only what has one number a head
is turned, so that the tokens of a chunk lie in a row.

    wide     [B, T, H, X]       one of its heads is [C, X] inside a kernel
    narrow   [B, T, H(, 1)]     [1, C]
    reset    [B, T] bool        [1, C], the number of the document, which enters the chunk as 0
    state    [B, H, K, V]       [V, K]: a decay a channel lies along rows
"""

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ModelError

LANES = 128
WIDTHS = (64, 128, 256, 512)  # of keys and values
#: Bytes of the vector memory a kernel may use: of 128 MiB on v5e, v5p and v6e, 64 MiB on tpu7x.
VMEM = 48 * 2**20


class Chunk(Protocol):
    """What a family defines for one chunk of one head, on the arrays of two axes named above."""

    name: str

    def results(self, *tokens) -> tuple[Any, ...]:
        """Shapes and dtypes of all tokens' results"""
        ...

    def forward(self, *args) -> tuple[tuple[Any, ...], Any]:
        """*tokens, the state that enters -> results, the state that leaves"""
        ...

    def backward(self, *args) -> tuple:
        """*tokens, the state that enters, cotangents of the results and of the state that leaves ->
        the cotangents of every token array but reset, and of the state"""
        ...


class OnTPU(NamedTuple):
    """The kernels as a form of `platforms.scan`."""

    chunk: Any
    size: int
    interpret: Any = False

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def backward(self, tokens, entering, d_y, d_state):
        d_y = tuple(jax.tree.leaves(d_y))
        return backward(self.chunk, tokens, entering, d_y, d_state, self.size, self.interpret)

    def _forward(self, tokens, state, keep: bool):
        ys, state, entering = forward(self.chunk, tokens, state, self.size, keep, self.interpret)
        [y] = [ys] if len(ys) > 1 else ys
        return (y, state), entering


def suits(tokens: tuple, state) -> bool:
    """Whether the kernels can run q, k, v, ...: of what they cannot, XLA makes its own."""
    q, k, v = tokens[:3]
    wide = [a for a in tokens if a.ndim == 4 and not _is_narrow(a)]
    grid = heads_per_step([a.shape[2:] for a in wide])
    if grid is None or not {a.shape[3] for a in wide} <= set(WIDTHS):
        return False
    _, inner, heads = grid
    states = inner * heads * math.prod(state.shape[2:]) * state.dtype.itemsize
    fits = 4 * states <= VMEM // 2  # what enters and what leaves, and each twice
    return fits and q.dtype == k.dtype == v.dtype


def require(name: str, tokens: tuple, state) -> None:
    """ModelError where they cannot."""
    if not suits(tokens, state):
        q, _, v, *_ = tokens
        raise ModelError(
            f"The TPU kernel of {name} takes keys and values of one dtype and of width "
            f"{', '.join(map(str, WIDTHS))}, not {q.dtype}{list(q.shape)} and "
            f"{v.dtype}{list(v.shape)}: leave the implementation to None."
        )


class Grid(NamedTuple):
    """B sequences of T tokens; `outer` groups of `inner` steps of `heads` heads each."""

    B: int
    T: int
    size: int  # of a chunk
    outer: int
    inner: int
    heads: int
    backward: bool

    @property
    def chunks(self) -> int:
        return -(-self.T // self.size)

    @property
    def steps(self) -> tuple[int, int, int, int]:
        return self.B, self.outer, self.chunks, self.inner

    @property
    def all_heads(self) -> int:
        return self.outer * self.inner * self.heads

    def time(self, chunk):
        return self.chunks - 1 - chunk if self.backward else chunk


def heads_per_step(widths: list[tuple[int, int]]) -> tuple[int, int, int] | None:
    """outer, inner, heads of `Grid` for wide arrays of these (heads, X); None where blocks of whole
    rows cannot be had."""
    H, G = max(h for h, _ in widths), min(h for h, _ in widths)
    aligned = lambda h, n: all(h == n or n * X % LANES == 0 for heads, X in widths if heads == h)
    group = H // G
    if any(h not in (H, G) for h, _ in widths) or H % G:
        return None
    for heads in (1, 2):
        if group == 1 and H % heads == 0 and aligned(H, heads):
            return H // heads, 1, heads
        if group > 1 and group % heads == 0 and aligned(H, heads) and aligned(G, 1):
            return G, group // heads, heads
    return None


def forward(chunk: Chunk, tokens, state, size: int, keep: bool, interpret=False):
    """The results, the state after the last token and, if `keep`, those that enter the chunks
    [N, B, H, K, V]."""
    grid, results = _grid(tokens, size, backward=False), chunk.results(*tokens)
    B, H, (K, V) = grid.B, grid.all_heads, state.shape[2:]
    kept = [jax.ShapeDtypeStruct((grid.chunks, B, H, V, K), state.dtype)] if keep else []
    turned = jnp.swapaxes(state, 2, 3)
    out_shape = [*(_laid_shape(r, grid) for r in results), *kept, _like(turned)]
    outputs = _call(
        functools.partial(_forward_kernel, chunk=chunk, grid=grid, tokens=tokens, keep=keep),
        grid,
        [*(_laid(a, grid) for a in tokens), turned],
        [*(_block(a, grid) for a in tokens), _state_block(grid, K, V)],
        out_shape,
        [
            *(_block(r, grid) for r in results),
            *(_kept_block(grid, K, V) for _ in kept),
            _state_block(grid, K, V),
        ],
        [],
        cost=(chunk.forward, [*_tiles(tokens, grid), _tile(state)]),
        name=f"{chunk.name}_forward",
        interpret=interpret,
    )
    ys = tuple(_unlaid(y, r) for y, r in zip(outputs, results, strict=False))
    entering = jnp.swapaxes(outputs[-2], 3, 4) if keep else None
    return ys, jnp.swapaxes(outputs[-1], 2, 3), entering


def backward(chunk: Chunk, tokens, entering, d_results, d_state, size: int, interpret=False):
    """Cotangents of the tokens (None for reset) and of the state."""
    grid = _grid(tokens, size, backward=True)
    K, V = d_state.shape[2:]
    floats = [a for a in tokens if a.dtype != bool]
    turned = jnp.swapaxes(d_state, 2, 3)
    shared = [a for a in floats if a.shape[2] < grid.all_heads and grid.inner > 1]
    sums = [pltpu.VMEM((size, a.shape[3]), turned.dtype) for a in shared]
    *d, d_state = _call(
        functools.partial(
            _backward_kernel, chunk=chunk, grid=grid, tokens=tokens, d_results=d_results
        ),
        grid,
        [*(_laid(a, grid) for a in tokens), jnp.swapaxes(entering, 3, 4)]
        + [*(_laid(a, grid) for a in d_results), turned],
        [*(_block(a, grid) for a in tokens), _kept_block(grid, K, V)]
        + [*(_block(a, grid) for a in d_results), _state_block(grid, K, V)],
        [*(_laid_shape(a, grid) for a in floats), _like(turned)],
        [*(_block(a, grid) for a in floats), _state_block(grid, K, V)],
        sums,
        cost=(
            chunk.backward,
            [*_tiles(tokens, grid), _tile(d_state)] + [*_tiles(d_results, grid), _tile(d_state)],
        ),
        name=f"{chunk.name}_backward",
        interpret=interpret,
    )
    found = iter(d)
    d_tokens = [None if a.dtype == bool else _unlaid(next(found), a) for a in tokens]
    return tuple(d_tokens), jnp.swapaxes(d_state, 2, 3)


# ---- kernels ----


def _forward_kernel(*refs, chunk, grid, tokens, keep):
    inputs, (initial, *outputs) = refs[: len(tokens)], refs[len(tokens) :]
    *results, state = outputs
    entering = results.pop() if keep else None
    for p, h in _heads(grid):

        @pl.when(pl.program_id(2) == 0)
        def _(h=h):
            state[h] = initial[h]

        S = state[h]
        if entering is not None:
            entering[p] = S
        ys, state[h] = chunk.forward(*_read(inputs, tokens, grid, p), S)
        for ref, y in zip(results, ys, strict=True):
            _write(ref, y, p)


def _backward_kernel(*refs, chunk, grid, tokens, d_results):
    n, m = len(tokens), len(d_results)
    inputs, entering, cotangents, last = refs[:n], refs[n], refs[n + 1 : n + 1 + m], refs[n + 1 + m]
    floats = [a for a in tokens if a.dtype != bool]
    outputs = refs[n + m + 2 :]
    d_tokens, state, sums = outputs[: len(floats)], outputs[len(floats)], outputs[len(floats) + 1 :]
    found = []
    for p, h in _heads(grid):

        @pl.when(pl.program_id(2) == 0)
        def _(h=h):
            state[h] = last[h]

        *d, state[h] = chunk.backward(
            *_read(inputs, tokens, grid, p),
            entering[p],
            *_read(cotangents, d_results, grid, p),
            state[h],
        )
        found.append(d)
    sums = iter(sums)
    for ref, a, *d in zip(d_tokens, floats, *found, strict=True):
        if a.shape[2] == grid.all_heads:
            for p, each in enumerate(d):
                _write(ref, each, p)
        else:
            _add_over_heads(ref, sum(d), grid, sums)


def _add_over_heads(ref, d, grid: Grid, sums):
    """The cotangent of what the heads of a group share, written when the last has added to it."""
    if grid.inner == 1:
        ref[...] = d.astype(ref.dtype)
        return
    added, step = next(sums), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        added[...] = jnp.zeros_like(added)

    added[...] += d

    @pl.when(step == grid.inner - 1)
    def _():
        ref[...] = added[...].astype(ref.dtype)


def _heads(grid: Grid):
    """The heads of a step: its number in the step, and in the group."""
    first = pl.program_id(3) * grid.heads if grid.inner > 1 else 0
    return [(p, first + p) for p in range(grid.heads)]


def _read(refs, arrays, grid: Grid, p: int):
    return [_tile_of(ref, a, grid, p) for ref, a in zip(refs, arrays, strict=True)]


def _tile_of(ref, a, grid: Grid, p: int):
    """Head p of a block: tokens beyond the last are zeros, which leave a state be."""
    if a.ndim == 2:
        return ref[...]
    if _is_narrow(a):
        return ref[p]
    X = a.shape[3]
    x = ref[:, p * X : (p + 1) * X] if _heads_of(a, grid) > 1 else ref[...]
    if grid.T % grid.size == 0:
        return x
    token = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    left = grid.T - grid.time(pl.program_id(2)) * grid.size
    return jnp.where(token < left, x, jnp.zeros((), x.dtype))


def _write(ref, x, p: int):
    """Head p of a block, narrow or wide."""
    if ref.ndim == 3:
        ref[p] = x.astype(ref.dtype)
    else:
        X = x.shape[1]
        ref[:, p * X : (p + 1) * X] = x.astype(ref.dtype)


# ---- how arrays lie ----


def _is_narrow(a) -> bool:
    return a.ndim == 3 or (a.ndim == 4 and a.shape[3] == 1)


def _heads_of(a, grid: Grid) -> int:
    """How many heads of it a step takes."""
    return grid.heads if a.shape[2] == grid.all_heads else 1


def _grid(tokens, size: int, backward: bool) -> Grid:
    found = heads_per_step([a.shape[2:] for a in tokens if a.ndim == 4 and not _is_narrow(a)])
    assert found is not None, "suits() is to be asked before"
    B, T = tokens[0].shape[:2]
    outer, inner, heads = found
    return Grid(B, T, size, outer, inner, heads, backward)


def _by_chunk(a, grid: Grid):
    """[B, T, ...] -> [B, ..., N, 1, C], padded with zeros"""
    a = jnp.pad(a, [(0, 0), (0, -grid.T % grid.size)] + [(0, 0)] * (a.ndim - 2))
    a = jnp.moveaxis(a, 1, -1)
    return a.reshape(*a.shape[:-1], grid.chunks, 1, grid.size)


def _laid(a, grid: Grid):
    if a.ndim == 2:
        return jnp.cumsum(_by_chunk(a, grid), -1).astype(jnp.float32)
    if _is_narrow(a):
        return _by_chunk(a.reshape(a.shape[:3]), grid)
    a = a.reshape(*a.shape[:2], -1)
    return jnp.pad(a, [(0, 0), (0, max(0, grid.size - grid.T)), (0, 0)])  # a block at least


def _laid_shape(a, grid: Grid):
    return jax.eval_shape(lambda a: _laid(a, grid), _like(a))


def _unlaid(laid, a):
    """`laid` in the shape of a."""
    if _is_narrow(a):
        B, H, N, _, C = laid.shape
        laid = jnp.moveaxis(laid.reshape(B, H, N * C), -1, 1)
    return laid[:, : a.shape[1]].reshape(a.shape)


def _block(a, grid: Grid) -> pl.BlockSpec:
    time, size, heads, inner = grid.time, grid.size, grid.heads, grid.inner
    if a.ndim == 2:
        return pl.BlockSpec((None, None, 1, size), lambda b, o, c, i: (b, time(c), 0, 0))
    if _is_narrow(a):
        index = lambda b, o, c, i: (b, o * inner + i, time(c), 0, 0)
        return pl.BlockSpec((None, heads, None, 1, size), index)
    own = a.shape[2] == grid.all_heads
    index = lambda b, o, c, i: (b, time(c), o * inner + i if own else o)
    return pl.BlockSpec((None, size, _heads_of(a, grid) * a.shape[3]), index)


def _state_block(grid: Grid, K: int, V: int) -> pl.BlockSpec:
    """The states of all heads of a group, which stay for all its steps."""
    return pl.BlockSpec((None, grid.inner * grid.heads, V, K), lambda b, o, c, i: (b, o, 0, 0))


def _kept_block(grid: Grid, K: int, V: int) -> pl.BlockSpec:
    index = lambda b, o, c, i: (grid.time(c), b, o * grid.inner + i, 0, 0)
    return pl.BlockSpec((None, None, grid.heads, V, K), index)


def _tiles(arrays, grid: Grid):
    """Shapes and dtypes of what a chunk's functions take."""
    wide = lambda a: a.ndim == 4 and not _is_narrow(a)
    return [
        jax.ShapeDtypeStruct((grid.size, a.shape[3]), a.dtype)
        if wide(a)
        else jax.ShapeDtypeStruct((1, grid.size), jnp.float32)
        for a in arrays
    ]


def _tile(state):
    return jax.ShapeDtypeStruct((state.shape[3], state.shape[2]), state.dtype)


def _like(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _call(kernel, grid, arrays, in_specs, out_shape, out_specs, scratch, *, cost, name, interpret):
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    arrays = [_varying(a, varying) for a in arrays]
    varies = jax.typeof(arrays[0]).manual_axis_type
    out_shape = [jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=varies) for s in out_shape]
    once, moved = pl.estimate_cost(cost[0], *cost[1]), [*arrays, *out_shape]
    times = math.prod(grid.steps) * grid.heads
    return pl.pallas_call(
        kernel,
        grid=grid.steps,
        in_specs=in_specs,
        out_shape=out_shape,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=once.flops * times,
            transcendentals=once.transcendentals * times,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved),
        ),
        interpret=interpret,
        name=name,
    )(*arrays)


def _varying(a, axes):
    """The same values, typed as differing along these mesh axes."""
    new = tuple(axes - jax.typeof(a).manual_axis_type.varying)
    return lax.pcast(a, new, to="varying") if new else a
