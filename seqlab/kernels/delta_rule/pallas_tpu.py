"""The chunked form as TPU kernels: `xla`'s equations for one chunk of one head.

Here (I + M)^-1 is formed, because a matrix unit multiplies by it sooner than it could substitute.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels import platforms
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.on_tpu import chunk_scan
from seqlab.kernels.on_tpu.channel_decay import ChannelDecay
from seqlab.kernels.on_tpu.head_decay import HeadDecay
from seqlab.kernels.on_tpu.tiles import column, row
from seqlab.kernels.precision import widen
from seqlab.kernels.tile_inverse import inverse
from seqlab.kernels.tiles import columns_by_columns, places, product, rows_by_rows


def chunked(q, k, v, beta, log_decay, reset, state, *, chunk_size: int = 64, interpret=False):
    """The definition's arguments and results; `pltpu.InterpretParams()` runs it on any machine."""
    tokens = (q, k, v, widen(beta), widen(log_decay), reset)
    chunk_scan.require("delta_rule", tokens, state)
    form = chunk_scan.OnTPU(DeltaRule(), chunk_length(q, chunk_size), interpret)
    return platforms.scan(platforms.Forms(form), tokens, state)


def form(tokens, state, size: int) -> chunk_scan.OnTPU | None:
    """The kernels, if they suit the tokens."""
    return chunk_scan.OnTPU(DeltaRule(), size) if chunk_scan.suits(tokens, state) else None


class DeltaRule(NamedTuple):
    """q, k [C, K], v [C, V], beta, document [1, C], log_decay [1, C] or [C, K], S [V, K]"""

    name: str = "delta_rule"

    def results(self, q, k, v, beta, log_decay, reset):
        return (jax.ShapeDtypeStruct(v.shape, v.dtype),)

    def forward(self, q, k, v, beta, log_decay, document, S):
        c = _Chunk(q, k, v, beta, log_decay, document, S)
        y = c.decay.read(q, S) + product(c.A.astype(v.dtype), c.w.astype(v.dtype))
        return (y,), c.decay.whole * S + c.decay.write(k, c.w)

    def backward(self, q, k, v, beta, log_decay, document, S, dy, D):
        c, few = _Chunk(q, k, v, beta, log_decay, document, S), lambda a: a.astype(v.dtype)
        dk_write, dw, writes = c.decay.write_gradient(k, c.w, D)
        u = columns_by_columns(c.inverse, dw + columns_by_columns(few(c.A), few(dy)))
        dv = c.beta * u
        dA, dM = (rows_by_rows(few(d), few(c.w)) for d in (dy, -u))
        d_beta = jnp.sum(u * c.error, 1, keepdims=True) + jnp.sum(dM * c.P, 1, keepdims=True)
        dq, dk, pairs = c.decay.scores_gradient(q, k, c.A, dA)
        dk_row, dk_column, more = c.decay.scores_gradient(k, k, c.P, c.below(c.beta * dM))
        dq_read, dS, reads = c.decay.read_gradient(q, S, dy)
        dk_read, dS_known, known = c.decay.read_gradient(k, S, -dv)
        acts = pairs + more + reads + known
        return (
            dq + dq_read,
            dk + dk_row + dk_column + dk_read + dk_write,
            dv,
            row(d_beta),
            c.decay.log_decay_gradient(acts, writes, S, D),
            dS + dS_known + c.decay.whole * D,
        )


class _Chunk:
    """What the forward and the backward pass of one chunk both need."""

    def __init__(self, q, k, v, beta, log_decay, document, S):
        kind = HeadDecay if log_decay.shape[0] == 1 else ChannelDecay
        self.decay, self.beta = kind(log_decay, document), column(beta)
        self.A, self.P = self.decay.scores(q, k), self.below(self.decay.scores(k, k))
        self.error = v - self.decay.read(k, S)
        self.inverse = inverse(self.beta * self.P)
        self.w = product(self.inverse, self.beta * self.error)

    @staticmethod
    def below(a):
        i, j = places(a.shape[0])
        return jnp.where(i > j, a, 0)
