"""The chunked form as TPU kernels: `xla`'s equations for one chunk of one head.

Here (I - A_ab)^-1 is formed: a matrix unit multiplies by it sooner than it could substitute.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels import platforms
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.diagonal_plus_low_rank import xla
from seqlab.kernels.on_tpu import chunk_scan
from seqlab.kernels.on_tpu.channel_decay import ChannelDecay
from seqlab.kernels.on_tpu.head_decay import HeadDecay
from seqlab.kernels.on_tpu.tiles import column
from seqlab.kernels.precision import widen
from seqlab.kernels.tile_inverse import inverse
from seqlab.kernels.tiles import columns_by_columns, product, rows_by_rows

OPERANDS = 5  # q, k, v, a, b


def chunked(q, k, v, a, b, log_decay, reset, state, *, chunk_size: int = 64, interpret=False):
    """The definition's arguments and results; `pltpu.InterpretParams()` runs it on any machine."""
    tokens = (q, k, v, a, b, widen(log_decay), reset)
    chunk_scan.require("diagonal_plus_low_rank", tokens, state, OPERANDS)
    form = chunk_scan.OnTPU(LowRank(), chunk_length(q, chunk_size), interpret)
    return platforms.scan(platforms.Forms(form), tokens, state)


def by_platform(q, k, v, a, b, log_decay, reset, state, *, chunk_size: int = 64):
    """The kernels where it is lowered for a TPU, if they suit, and `xla` elsewhere."""
    tokens, size = (q, k, v, a, b, widen(log_decay), reset), chunk_length(q, chunk_size)
    if not chunk_scan.suits(tokens, state, OPERANDS):
        return xla.form(size).run(tokens, state)
    forms = platforms.Forms(xla.form(size), chunk_scan.OnTPU(LowRank(), size))
    return platforms.scan(forms, tokens, state)


class LowRank(NamedTuple):
    """q, k, a, b [C, K], v [C, V], log_decay [1, C] or [C, K], document [1, C], S [V, K]"""

    name: str = "diagonal_plus_low_rank"

    def results(self, q, k, v, a, b, log_decay, reset):
        return (jax.ShapeDtypeStruct(v.shape, v.dtype),)

    def forward(self, q, k, v, a, b, log_decay, document, S):
        c, few = _Chunk(q, k, v, a, b, log_decay, document, S), lambda x: x.astype(v.dtype)
        y = c.decay.read(q, S) + product(few(c.A_qk), v) + product(few(c.A_qb), few(c.w))
        return (y,), c.decay.whole * S + c.decay.write(k, v) + c.decay.write(b, c.w)

    def backward(self, q, k, v, a, b, log_decay, document, S, dy, D):
        c, few = _Chunk(q, k, v, a, b, log_decay, document, S), lambda x: x.astype(v.dtype)
        decay, w, dy = c.decay, few(c.w), few(dy)
        dk, dv, writes = decay.write_gradient(k, v, D)
        db, dw, more = decay.write_gradient(b, c.w, D)
        u = columns_by_columns(c.inverse, dw + columns_by_columns(few(c.A_qb), dy))
        dv += columns_by_columns(few(c.A_qk), dy) + columns_by_columns(few(c.A_ak), few(u))
        d_read, first = _earlier(u), few(_first(u))
        dq, dS_q, reads = decay.read_gradient(q, S, dy)
        da, dS_a, acts = decay.read_gradient(c.a_earlier, S, d_read)
        dx, dy_pairs, pairs = self._scores_gradients(c, q, k, b, (dy, few(d_read)), (v, w))
        da = _later(da + dx[1]) + product(first, few(S))
        dS = dS_q + dS_a + decay.whole * D + columns_by_columns(first, c.a)
        return (
            dq + dx[0],
            dk + dy_pairs[0],
            dv,
            da * c.reads_any,
            db + dy_pairs[1],
            decay.log_decay_gradient(pairs + reads + acts, writes + more, S, D),
            dS,
        )

    def _scores_gradients(self, c, q, k, b, d_rows, written):
        """Cotangents of q and of a one token earlier, of k and b, and what decays of pairs act on,
        from the cotangents of what is read and from what k and b write."""
        rows, columns = (q, c.a_earlier), (k, b)
        found = [
            [
                c.decay.scores_gradient(x, y, c.scores[i][j], rows_by_rows(d_rows[i], written[j]))
                for j, y in enumerate(columns)
            ]
            for i, x in enumerate(rows)
        ]
        d_rows = [one[0][0] + one[1][0] for one in found]
        d_columns = [found[0][j][1] + found[1][j][1] for j in range(2)]
        return d_rows, d_columns, sum(each[2] for one in found for each in one)


class _Chunk:
    """What the forward and the backward pass of one chunk both need."""

    def __init__(self, q, k, v, a, b, log_decay, document, S):
        kind = HeadDecay if log_decay.shape[0] == 1 else ChannelDecay
        self.decay, few = kind(log_decay, document), lambda x: x.astype(v.dtype)
        documents = jnp.broadcast_to(column(document), v.shape)
        self.reads_any = jnp.where(documents == _later(documents), 1, 0)[:, :1]  # not the first
        self.a = few(widen(a) * self.reads_any)
        self.a_earlier = few(_earlier(widen(self.a)))  # it reads what the token before it leaves
        self.scores = [[self.decay.scores(x, y) for y in (k, b)] for x in (q, self.a_earlier)]
        (self.A_qk, self.A_qb), A_a = self.scores
        self.A_ak, A_ab = map(_later, A_a)
        reads = _later(self.decay.read(self.a_earlier, S)) + rows_by_rows(_first(self.a), few(S))
        self.inverse = inverse(-A_ab)
        self.w = product(self.inverse, reads + product(few(self.A_ak), v))


def _later(rows):
    """Rows [C, X] one token later, and none before the first."""
    return jnp.where(_token(rows) == 0, 0, pltpu.roll(rows, 1, 0))


def _earlier(rows):
    """Cotangents of `_later`."""
    last = rows.shape[0] - 1
    return jnp.where(_token(rows) == last, 0, pltpu.roll(rows, last, 0))


def _first(rows):
    """The first row alone, and zeros."""
    return jnp.where(_token(rows) == 0, rows, jnp.zeros((), rows.dtype))


def _token(rows):
    return lax.broadcasted_iota(jnp.int32, rows.shape, 0)
