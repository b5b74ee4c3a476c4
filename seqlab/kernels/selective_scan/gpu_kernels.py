"""The GPU kernels of the selective scan: see `pallas_gpu`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from seqlab.kernels.precision import widen


class Walk(NamedTuple):
    """T tokens in chunks of `size` and groups of `group`; E channels in programs of e, N states in
    blocks of a power of two. The methods give an array and its block for program (b, p)."""

    B: int
    T: int
    E: int
    N: int
    size: int
    e: int
    group: int
    interpret: bool

    @classmethod
    def of(cls, tokens, *options) -> "Walk":
        B, T, E = tokens[0].shape
        return cls(B, T, E, len(tokens[-1]), *options)

    @property
    def programs(self) -> int:
        return pl.cdiv(self.E, self.e)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.T, self.size)

    @property
    def groups(self) -> int:
        """Of a chunk."""
        return pl.cdiv(self.size, self.group)

    @property
    def rows(self) -> int:
        return pl.next_power_of_2(self.N)

    def of_tokens(self, tokens) -> list:
        u, dt, b, c, reset, A = tokens
        return [
            *map(self.of_channels, (u, dt)),
            *((a, pl.BlockSpec((None, self.T, self.rows), lambda b, p: (b, 0, 0))) for a in (b, c)),
            (reset.astype(jnp.int32), pl.BlockSpec((None, self.T), lambda b, p: (b, 0))),
            (A, pl.BlockSpec((self.rows, self.e), lambda b, p: (0, p))),
        ]

    def of_channels(self, a) -> tuple:
        return a, pl.BlockSpec((None, self.T, self.e), lambda b, p: (b, 0, p))

    def of_state(self, a) -> tuple:
        return a, pl.BlockSpec((None, self.rows, self.e), lambda b, p: (b, 0, p))

    def of_states(self, a) -> tuple:
        """Several of each program."""
        block = (a.shape[0], None, self.rows, self.e)
        return a, pl.BlockSpec(block, lambda b, p: (0, b, 0, p))

    def shares(self, a) -> tuple:
        """What every program has of b or c."""
        return a, pl.BlockSpec((None, None, self.T, self.rows), lambda b, p: (p, b, 0, 0))


# ---- kernels ----


def forward(walk: Walk, u, dt, b, c, reset, A, state, y, last, entering=None):
    tile = _Tile(walk)
    tokens, A = (u, dt, b, c, reset), tile.states(A)

    def chunk(n, h):
        if entering is not None:
            tile.keep(entering.at[n], h)

        def group(g, h):
            for token in tile.group(tokens, n, g):
                h = token.decay(A) * h + token.write
                tile.put(y, token, jnp.sum(h * token.c, 0))
            return h

        return lax.fori_loop(0, walk.groups, group, h)

    tile.keep(last, lax.fori_loop(0, walk.chunks, chunk, tile.states(state)))


def backward(walk: Walk, u, dt, b, c, reset, A, entering, d_y, d_last, *outputs):
    *d_tokens, dA, d_first, between = outputs
    tile = _Tile(walk)
    tokens, A = (u, dt, b, c, reset), tile.states(A)

    def chunk(i, carry):
        n = walk.chunks - 1 - i

        def again(g, h):
            tile.keep(between.at[g], h)
            for token in tile.group(tokens, n, g):
                h = token.decay(A) * h + token.write
            return h

        def group(i, carry):
            g = walk.groups - 1 - i
            h, entered = tile.states(between.at[g]), []
            for token in tile.group(tokens, n, g):
                entered.append((token, h, tile.channels(d_y, token)))
                h = token.decay(A) * h + token.write
            for token, h, dy in reversed(entered):
                carry = _back(tile, token, h, dy, A, d_tokens, carry)
            return carry

        lax.fori_loop(0, walk.groups, again, tile.states(entering.at[n]))
        tile.wait()  # what one thread wrote between groups another may read
        carry = lax.fori_loop(0, walk.groups, group, carry)
        tile.wait()
        return carry

    D = tile.states(d_last)
    D, d_decays = lax.fori_loop(0, walk.chunks, chunk, (D, jnp.zeros_like(D)))
    tile.keep(d_first, D)
    tile.keep(dA, d_decays)


def _back(tile, token, h, dy, A, d_tokens, carry):
    """One token of `token_by_token.backward`."""
    (du, ddt, db, dc), (D, dA) = d_tokens, carry
    decay = token.decay(A)
    D += token.c * dy
    kept = decay * h
    through, read = D * kept, jnp.sum(D * token.b, 0)
    tile.put(du, token, read * token.dt)
    tile.put(ddt, token, jnp.sum(through * A, 0) + read * token.u)
    tile.share(db, token, jnp.sum(D * (token.dt * token.u), 1))
    tile.share(dc, token, jnp.sum((kept + token.write) * dy, 1))
    return D * decay, dA + through * token.dt


class _Token(NamedTuple):
    time: Any
    here: Any  # whether it exists: others are zeros, which leave a state be
    u: Any  # [e]
    dt: Any
    b: Any  # [N, 1]
    c: Any
    reset: Any

    def decay(self, A):
        return jnp.exp(jnp.where(self.reset, -jnp.inf, self.dt * A))

    @property
    def write(self):
        return self.dt * self.u * self.b


class _Tile:
    """What a program reads and writes."""

    def __init__(self, walk: Walk):
        self.walk = walk
        self.inside = pl.program_id(1) * walk.e + jnp.arange(walk.e) < walk.E
        self.real = jnp.arange(walk.rows) < walk.N
        self.both = self.real[:, None] & self.inside[None]

    def group(self, tokens, n, g) -> list[_Token]:
        """Group g of chunk n: reads of several tokens wait for memory once."""
        size, group = self.walk.size, self.walk.group
        first, end = n * size + g * group, jnp.minimum((n + 1) * size, self.walk.T)
        return [self.token(tokens, first + j, first + j < end) for j in range(group)]

    def token(self, tokens, time, here) -> _Token:
        *floats, reset = tokens
        masks = [self.inside, self.inside, self.real, self.real]
        reads = zip(floats, masks, strict=True)
        u, dt, b, c = (_read(ref.at[time], mask & here) for ref, mask in reads)
        return _Token(time, here, u, dt, b[:, None], c[:, None], _read(reset.at[time], here) != 0)

    def channels(self, ref, token: _Token):
        """[e] of a token"""
        return _read(ref.at[token.time], self.inside & token.here)

    def put(self, ref, token: _Token, value):
        """[e] of a token"""
        _write(ref.at[token.time], value, self.inside & token.here)

    def share(self, ref, token: _Token, value):
        """[N] of a token"""
        _write(ref.at[token.time], value, self.real & token.here)

    def states(self, ref):
        return _read(ref, self.both)

    def keep(self, ref, states):
        _write(ref, states, self.both)

    def wait(self):
        if not self.walk.interpret:
            triton.debug_barrier()


def _read(ref, mask):
    a = triton.load(ref, mask=mask, other=0)
    return a if jnp.issubdtype(a.dtype, jnp.integer) else widen(a)


def _write(ref, a, mask):
    triton.store(ref, a.astype(ref.dtype), mask=mask)
