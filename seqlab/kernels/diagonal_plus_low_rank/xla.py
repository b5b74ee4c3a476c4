"""The chunked form in XLA: what a reads inside a chunk is solved for, then only added.

a_t reads the state that token t - 1 leaves, so it stands as a row one token earlier. With e(i, j)
the decay from token j to token i, e(i) that from the chunk's start and S what enters:

    A_xy = x_i . (e(i, j) y_j), for x of q, a and y of k, b; for q with j <= i, for a with j < i
           and e(i - 1, j)
    w    = (I - A_ab)^-1 ((e a) S + A_ak v)          what a reads
    y    = (e q) S + A_qk v + A_qb w
    S'   = e S + (k decayed to the end)^T v + (b decayed to the end)^T w

Backward, with u for the cotangent of what w is solved from:

    dw = A_qb^T dy + (b decayed to the end) D        u = (I - A_ab)^-T dw
    dA = (dy, u) (v, w)^T                            dv = A_qk^T dy + A_ak^T u + (k to the end) D

The rest is what `HeadDecay` and `ChannelDecay` make of scores, reads and writes.
"""

import jax.numpy as jnp

from seqlab.kernels import chunk_scan
from seqlab.kernels.channel_decay import ChannelDecay
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.head_decay import HeadDecay
from seqlab.kernels.precision import dot, widen
from seqlab.kernels.unit_lower import UnitLower
from seqlab.parallel.transitions import Matrix


def chunked(q, k, v, a, b, log_decay, reset, state, *, chunk_size: int = 64):
    """The definition's arguments and results; any T, any decay from -1e-6 to -80 and beyond."""
    tokens = (q, k, v, a, b, log_decay, reset)
    return form(chunk_length(q, chunk_size)).run(tokens, state)


def form(size: int) -> chunk_scan.InXLA:
    """The same for chunks of a length, as `platforms.scan` takes it."""

    def prepared(q, k, v, a, b, log_decay, reset):
        return q, k, v, a, b, widen(log_decay), reset

    def finished(y, q, k, v, a, b, log_decay, reset):
        return y.astype(v.dtype)

    return chunk_scan.InXLA(_LowRank, size, prepared, finished, turned=widen)


def transition(q, k, v, a, b, log_decay, reset, *, chunk_size: int = 64) -> Matrix:
    """What these tokens do to the state [B, H, K, V] that enters them."""
    tokens = (q, k, v, a, b, widen(log_decay), reset)
    return chunk_scan.transition(_LowRank, tokens, chunk_length(q, chunk_size))


class _LowRank:
    """One chunk: q, k, a, b [B, C, H, K], v [B, C, H, V], log_decay [B, C, H, 1 or K],
    S [B, H, K, V]."""

    @staticmethod
    def forward(q, k, v, a, b, log_decay, reset, S):
        c = _Chunk(q, k, v, a, b, log_decay, reset, S)
        y = c.reads_q + dot("bgrij,bgrjv->bgriv", c.A_q.astype(v.dtype), c.written.astype(v.dtype))
        S = c.decay.whole * c.S + c.decay.write(c.columns, c.written)
        return c.decay.of_values(y), c.decay.of_state(S)

    @staticmethod
    def transition(q, k, v, a, b, log_decay, reset) -> Matrix:
        K, H = k.shape[-1], v.shape[2]
        eye = jnp.broadcast_to(jnp.eye(K, dtype=log_decay.dtype), (len(k), H, K, K))
        nothing = jnp.zeros((*v.shape[:3], K), v.dtype)
        _, matrix = _LowRank.forward(q, k, nothing, a, b, log_decay, reset, eye)
        empty = jnp.zeros((*eye.shape[:3], v.shape[-1]), eye.dtype)
        _, update = _LowRank.forward(q, k, v, a, b, log_decay, reset, empty)
        return Matrix(matrix, update)

    @staticmethod
    def backward(q, k, v, a, b, log_decay, reset, S, dy, D):
        """Cotangents of q, k, v, a, b, log_decay and S from those of y and the next state."""
        c, few = _Chunk(q, k, v, a, b, log_decay, reset, S), lambda a: a.astype(v.dtype)
        dy, D = c.decay.values(dy), c.decay.state(D)
        dy_write, d_written, writes = c.decay.write_gradient(c.columns, c.written, D)
        d_written += dot("bgrij,bgriv->bgrjv", few(c.A_q), few(dy))
        dv, dw = jnp.split(d_written, 2, 3)
        u = c.system.solve_transposed(dw)
        dv += dot("bgrij,bgriv->bgrjv", few(c.A_ak), few(u))
        d_reads = jnp.concatenate([dy, c.before(u)], 3)
        d_scores = dot("bgriv,bgrjv->bgrij", few(d_reads), few(c.written))
        dx, dy_pairs, pairs = c.decay.scores_gradient(c.rows, c.columns, c.scores, d_scores)
        dx_read, dS, reads = c.decay.read_gradient(c.rows, c.S, d_reads)
        d_log_decay = c.decay.log_decay_gradient(pairs + reads, writes, c.S, D)
        dq, da = jnp.split(dx + dx_read, 2, 2)
        dk, db = jnp.split(dy_pairs + dy_write, 2, 2)
        da_first = dot("bgrv,bgrkv->bgk", few(u[:, :, :, 0]), few(c.S))
        dS += c.decay.whole * D + dot("bgk,bgrv->bgrkv", c.a_first, few(u[:, :, :, 0]))
        da = c.after(da, da_first) * c.reads_any
        keys = lambda d, like: c.decay.of_keys(d, like)
        dS, dv = c.decay.of_state(dS), c.decay.of_values(dv)
        return keys(dq, q), keys(dk, k), dv, keys(da, a), keys(db, b), d_log_decay, None, dS


class _Chunk:
    """What the forward and the backward pass of one chunk both need, in the layouts of `decay`."""

    def __init__(self, q, k, v, a, b, log_decay, reset, S):
        kind = HeadDecay if log_decay.shape[-1] == 1 else ChannelDecay
        self.decay = decay = kind(log_decay, reset, k.shape[2], rows=2, columns=2)
        self.S = decay.state(S)
        self.reads_any = jnp.where(reset, 0, 1)[:, None, :, None]  # a document's first does not
        a = decay.keys(a) * self.reads_any.astype(a.dtype)
        self.a_first = a[:, :, 0]
        self.rows = jnp.concatenate([decay.keys(q), self.before(a)], 2)
        self.columns = decay.keys(k, b)
        self.scores = decay.scores(self.rows, self.columns)
        self.A_q, A_a = jnp.split(self.scores, 2, 3)
        self.A_ak, A_ab = jnp.split(self.after(A_a), 2, 4)
        self.reads_q, reads = jnp.split(decay.read(self.rows, self.S), 2, 3)
        first = dot("bgk,bgrkv->bgrv", self.a_first, self.S.astype(k.dtype))
        reads = self.after(reads, first)
        v = decay.values(v)
        self.system = UnitLower(-A_ab)
        reads += dot("bgrij,bgrjv->bgriv", self.A_ak.astype(v.dtype), v)
        self.written = jnp.concatenate([widen(v), self.system.solve(reads)], 3)

    def after(self, rows, first=None):
        """Rows [..., C, X] one token later; the first is `first`, or zero."""
        first = jnp.zeros_like(rows[..., 0, :]) if first is None else first
        return jnp.concatenate([first[..., None, :].astype(rows.dtype), rows[..., :-1, :]], -2)

    def before(self, rows):
        """Cotangents of `after`: rows [..., C, X] one token earlier."""
        return jnp.concatenate([rows[..., 1:, :], jnp.zeros_like(rows[..., :1, :])], -2)
