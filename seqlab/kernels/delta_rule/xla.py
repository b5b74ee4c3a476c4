"""The chunked form in XLA: what the tokens of a chunk write is solved for, then only added.

With e(i, j) the decay from token j to token i, e(i) that from the chunk's start and S what enters:

    A_ij = q_i . (e(i, j) k_j) for j <= i          M_ij = beta_i k_i . (e(i, j) k_j) for j < i
    w    = (I + M)^-1 beta (v - (e k) S)           the corrections that the tokens write
    y    = (e q) S + A w                           S' = e S + (k decayed to the end)^T w

(Yang et al., 2024; Yang, Kautz & Hatamizadeh, 2024; with one decay a channel, Kimi Team, 2025. They
store (I + M)^-1; here w is solved for, which needs no more than its product and less arithmetic.)
The backward pass solves the transposed system; u stands for the cotangent of what w is solved from:

    dw = A^T dy + (k decayed to the end) D         u  = (I + M)^-T dw
    dA = dy w^T   dM = -u w^T                      dv = beta u
    dS = e D + (e q)^T dy - (e k)^T beta u

The rest is what `HeadDecay` and `ChannelDecay` make of scores, reads and writes.
"""

import jax.numpy as jnp

from seqlab.kernels import chunk_scan
from seqlab.kernels.channel_decay import ChannelDecay
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.head_decay import HeadDecay
from seqlab.kernels.precision import dot, total, widen
from seqlab.kernels.unit_lower import UnitLower
from seqlab.parallel.transitions import Matrix


def chunked(q, k, v, beta, log_decay, reset, state, *, chunk_size: int = 64):
    """The definition's arguments and results; any T, any decay from -1e-6 to -80 and beyond."""
    tokens = (q, k, v, beta, log_decay, reset)
    return form(chunk_length(q, chunk_size)).run(tokens, state)


def form(size: int) -> chunk_scan.InXLA:
    """The same for chunks of a length, as `platforms.scan` takes it."""

    def prepared(q, k, v, beta, log_decay, reset):
        return q, k, v, widen(beta), widen(log_decay), reset

    def finished(y, q, k, v, beta, log_decay, reset):
        return y.astype(v.dtype)

    return chunk_scan.InXLA(DeltaRule, size, prepared, finished, turned=widen)


def transition(q, k, v, beta, log_decay, reset, *, chunk_size: int = 64) -> Matrix:
    """What these tokens do to the state [B, H, K, V] that enters them."""
    tokens = (q, k, v, widen(beta), widen(log_decay), reset)
    return chunk_scan.transition(DeltaRule, tokens, chunk_length(q, chunk_size))


class DeltaRule:
    """One chunk: q, k [B, C, G, K], v [B, C, H, V], beta [B, C, H], log_decay [B, C, H, 1 or K],
    S [B, H, K, V]."""

    @staticmethod
    def forward(q, k, v, beta, log_decay, reset, S):
        c = _Chunk(q, k, v, beta, log_decay, reset, S)
        y = c.from_start + dot("bgrij,bgrjv->bgriv", c.A.astype(v.dtype), c.w.astype(v.dtype))
        S = c.decay.whole * c.S + c.decay.write(c.key, c.w)
        return c.decay.of_values(y), c.decay.of_state(S)

    @staticmethod
    def transition(q, k, v, beta, log_decay, reset) -> Matrix:
        K, H = k.shape[-1], v.shape[2]
        eye = jnp.broadcast_to(jnp.eye(K, dtype=log_decay.dtype), (len(k), H, K, K))
        nothing = jnp.zeros((*v.shape[:3], K), v.dtype)
        _, matrix = DeltaRule.forward(q, k, nothing, beta, log_decay, reset, eye)
        empty = jnp.zeros((*eye.shape[:3], v.shape[-1]), eye.dtype)
        _, update = DeltaRule.forward(q, k, v, beta, log_decay, reset, empty)
        return Matrix(matrix, update)

    @staticmethod
    def backward(q, k, v, beta, log_decay, reset, S, dy, D):
        """Cotangents of q, k, v, beta, log_decay and S from those of y and the next state."""
        c, few = _Chunk(q, k, v, beta, log_decay, reset, S), lambda a: a.astype(v.dtype)
        dy, D = c.decay.values(dy), c.decay.state(D)
        dk_write, dw, writes = c.decay.write_gradient(c.key, c.w, D)
        u = c.system.solve_transposed(dw + dot("bgrij,bgriv->bgrjv", few(c.A), few(dy)))
        dv = c.beta * u
        dA, dM = (dot("bgriv,bgrjv->bgrij", few(d), few(c.w)) for d in (dy, -u))
        d_beta = total(u * c.error) + total(dM * c.P)
        d_scores = jnp.concatenate([dA, c.beta * dM * c.strict], 3)
        dx, dk, pairs = c.decay.scores_gradient(c.rows, c.key, c.scores, d_scores)
        dx_read, dS, reads = c.decay.read_gradient(c.rows, c.S, jnp.concatenate([dy, -dv], 3))
        d_log_decay = c.decay.log_decay_gradient(pairs + reads, writes, c.S, D)
        dq, dk_row = jnp.split(dx + dx_read, 2, 2)
        return (
            c.decay.of_keys(dq, q),
            c.decay.of_keys(dk + dk_row + dk_write, k),
            c.decay.of_values(dv),
            c.decay.of_values(d_beta[..., None])[..., 0],
            d_log_decay,
            None,
            c.decay.of_state(dS + c.decay.whole * D),
        )


class _Chunk:
    """What the forward and the backward pass of one chunk both need, in the layouts of `decay`."""

    def __init__(self, q, k, v, beta, log_decay, reset, S):
        kind = HeadDecay if log_decay.shape[-1] == 1 else ChannelDecay
        self.decay = decay = kind(log_decay, reset, k.shape[2], rows=2, columns=1)
        self.S, self.beta = decay.state(S), decay.values(beta[..., None])  # [B, G, R, C, 1]
        self.rows, self.key = decay.keys(q, k), decay.keys(k)
        self.scores = decay.scores(self.rows, self.key)
        self.strict = jnp.tri(k.shape[1], k=-1, dtype=self.beta.dtype)
        self.A, P = jnp.split(self.scores, 2, 3)
        self.P = P * self.strict
        self.from_start, known = jnp.split(decay.read(self.rows, self.S), 2, 3)
        self.error = decay.values(v) - known
        self.system = UnitLower(self.beta * self.P)
        self.w = self.system.solve(self.beta * self.error)
