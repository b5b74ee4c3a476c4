"""The chunked form in XLA: products inside a chunk, a scan of states between chunks.

Within a chunk, with G the inclusive cumulative log decay, Gamma its last row and S what enters:

    A_ij = q_i . (exp(G_i - G_j) k_j)  for j <= i in the same document
    y    = (q e^G) S + A v
    S'   = e^Gamma S + (k e^(Gamma - G))^T v

(Yang et al., 2023; Dao & Gu, 2024.) Gradients are written out (D is the cotangent of S'):

    dA = dy v^T   dq = row(dA, k) + e^G dy S^T     dk = col(dA, q) + e^(Gamma - G) v D^T
    dv = A^T dy + (k e^(Gamma - G)) D              D_prev = e^Gamma D + (q e^G)^T dy
    a log decay collects q dq - k dk of later tokens, k dk of earlier ones that reach S', and D S

How scores, reads and writes are formed depends on the decay: see `HeadDecay` and `ChannelDecay`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels import chunk_scan
from seqlab.kernels.channel_decay import ChannelDecay
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.head_decay import HeadDecay
from seqlab.kernels.precision import dot, widen
from seqlab.parallel.transitions import Diagonal

#: Products of so many heads occupy a processor; of fewer heads, some chunks run together.
HEADS, MOST_TOGETHER = 32, 4


def chunked(q, k, v, log_decay, reset, state, *, chunk_size: int = 64, normaliser: bool = False):
    """The definition's arguments and results; any T, any decay from -1e-6 to -80 and beyond."""
    tokens = (q, k, v, log_decay, reset)
    return form(v, chunk_length(q, chunk_size), normaliser).run(tokens, state)


def form(v, size: int, normaliser: bool) -> chunk_scan.InXLA:
    """The same for chunks of a length, as `platforms.scan` takes it."""

    def prepared(q, k, v, log_decay, reset):
        return q, k, written(v, normaliser), widen(log_decay), reset

    def finished(y, q, k, v, log_decay, reset):
        return read(y, v, normaliser)

    def turned(d_y):
        return jnp.concatenate([widen(d_y[0]), d_y[1][..., None]], -1) if normaliser else widen(d_y)

    B, T, H, _ = v.shape
    spare = max(HEADS // (B * H), 1)
    together = math.gcd(-(-T // size), min(1 << spare.bit_length() - 1, MOST_TOGETHER))
    return chunk_scan.InXLA(OuterProduct(size), size * together, prepared, finished, turned)


def transition(
    q, k, v, log_decay, reset, *, chunk_size: int = 64, normaliser: bool = False
) -> Diagonal:
    """What these tokens do to the state that enters them."""
    tokens = (q, k, written(v, normaliser), widen(log_decay), reset)
    return chunk_scan.transition(OuterProduct(), tokens, chunk_length(q, chunk_size))


def apart(
    hops, q, k, v, log_decay, reset, nothing, *, chunk_size: int = 64, normaliser: bool = False
):
    """See `recurrence`: what a state brings is one product more."""
    tokens = (q, k, written(v, normaliser), widen(log_decay), reset)
    size = chunk_length(q, chunk_size)
    found = chunk_scan.apart(OuterProduct(), tokens, nothing, size, hops, _remembered)
    if found is None:
        return None
    return found._replace(finish=lambda *results: read(found.finish(*results), v, normaliser))


def _remembered(q, k, v, log_decay, reset, state):
    """What tokens [B, T, ...] that write nothing read of a state, [B, T, H, V], and leave of it."""
    here = (jnp.cumsum(reset, 1) == 0)[..., None, None]
    decay = jnp.exp(jnp.where(here, jnp.cumsum(log_decay, 1), -jnp.inf))
    rows = jnp.repeat(q, state.shape[1] // q.shape[2], 2)
    few = lambda a: a.astype(q.dtype)
    y = dot("bthk,bhkv->bthv", few(rows * decay), few(state))
    return y, decay[:, -1, ..., None] * state


def written(v: jax.Array, normaliser: bool) -> jax.Array:
    """What is written: v [B, T, H, V], beside it a column of ones if there is a normaliser."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1) if normaliser else v


def read(y: jax.Array, v: jax.Array, normaliser: bool):
    """What is returned, of what was read in float32 from what `written` wrote."""
    if not normaliser:
        return y.astype(v.dtype)
    return y[..., :-1].astype(v.dtype), y[..., -1]


class OuterProduct(NamedTuple):
    """Chunks of `size` tokens, or one of all, at once but for the states between them: q, k
    [B, N size, G, K], v [B, N size, H, V], log_decay [B, N size, H, 1 or K], S [B, H, K, V]. What
    is kept are the states that enter them, [N B, H, K, V]."""

    size: int | None = None

    def forward(self, q, k, v, log_decay, reset, S):
        c = _Chunks(self.size, q, k, v, log_decay, reset)
        entering, S = c.states(c.decay.state(S))
        y = c.decay.read(c.q, entering) + dot("bgrij,bgrjv->bgriv", c.A.astype(v.dtype), c.v)
        return c.in_order(c.decay.of_values(y)), c.decay.of_state(S)

    def keep(self, q, k, v, log_decay, reset, S):
        c = _Chunks(self.size, q, k, v, log_decay, reset)
        entering, _ = c.states(c.decay.state(S))
        return _turned(c.decay.of_state(entering), len(S))

    def transition(self, q, k, v, log_decay, reset) -> Diagonal:
        c = _Chunks(self.size, q, k, v, log_decay, reset)  # of one chunk
        return Diagonal(c.decay.of_state(c.decay.whole), c.decay.of_state(c.decay.write(c.k, c.v)))

    def backward(self, q, k, v, log_decay, reset, entering, dy, D):
        """Cotangents of q, k, v, log_decay and S from those of y and the next state."""
        c = _Chunks(self.size, q, k, v, log_decay, reset)
        S = c.decay.state(_turned(entering, c.number))
        dy = c.decay.values(c.apart(dy))
        few = dy.astype(v.dtype)
        dA = dot("bgriv,bgrjv->bgrij", few, c.v)
        dq, dk, pairs = c.decay.scores_gradient(c.q, c.k, c.A, dA)
        dq_read, dS, reads = c.decay.read_gradient(c.q, S, dy)
        leaving, D = c.cotangents(dS, c.decay.state(D))
        dk_write, dv, writes = c.decay.write_gradient(c.k, c.v, leaving)
        dv += dot("bgrij,bgriv->bgrjv", c.A.astype(v.dtype), few)
        tokens = (
            c.decay.of_keys(dq + dq_read, c.apart(q)),
            c.decay.of_keys(dk + dk_write, c.apart(k)),
            c.decay.of_values(dv),
            c.decay.log_decay_gradient(pairs + reads, writes, S, leaving),
        )
        return *map(c.in_order, tokens), None, c.decay.of_state(D)


class _Chunks:
    """What the forward and the backward pass both need, in the layouts of `decay`; chunks are
    further rows of the batch."""

    def __init__(self, size: int | None, *tokens):
        self.number = tokens[0].shape[1] // size if size else 1
        q, k, v, log_decay, reset = map(self.apart, tokens)
        kind = HeadDecay if log_decay.shape[-1] == 1 else ChannelDecay
        self.decay = kind(log_decay, reset, k.shape[2], rows=1, columns=1)
        self.q, self.k, self.v = self.decay.keys(q), self.decay.keys(k), self.decay.values(v)
        self.A = self.decay.scores(self.q, self.k)

    def apart(self, a):
        """[B, N C, ...] -> [B N, C, ...]"""
        return a.reshape(a.shape[0] * self.number, -1, *a.shape[2:])

    def in_order(self, a):
        """[B N, C, ...] -> [B, N C, ...]"""
        return a.reshape(a.shape[0] // self.number, -1, *a.shape[2:])

    def states(self, S):
        """Those that enter the chunks, as rows of the batch, and the one that leaves the last."""
        return self._carried(S, self.decay.write(self.k, self.v), range(self.number))

    def cotangents(self, dS, D):
        """Those of the states that leave the chunks, and of the one that enters the first, from
        what each chunk's reads add to that of what enters it."""
        return self._carried(D, dS, range(self.number)[::-1])

    def _carried(self, S, more, order):
        """What each chunk is given, where it hands on whole * S + more."""
        at = lambda a, n: a.reshape(-1, self.number, *a.shape[1:])[:, n]
        given = {}
        for n in order:
            given[n], S = S, at(self.decay.whole, n) * S + at(more, n)
        stacked = jnp.stack([given[n] for n in range(self.number)], 1)
        return stacked.reshape(-1, *stacked.shape[2:]), S


def _turned(a, n: int):
    """[m n, ...] -> [n m, ...]"""
    return jnp.swapaxes(a.reshape(-1, n, *a.shape[1:]), 0, 1).reshape(a.shape)
