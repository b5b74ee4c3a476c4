"""The chunked form as TPU kernels: `xla`'s equations for one chunk of one head."""

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
from seqlab.kernels.tiles import columns_by_columns, product, rows_by_rows


def chunked(q, k, v, log_decay, reset, state, *, chunk_size=64, normaliser=False, interpret=False):
    """The definition's arguments and results; `pltpu.InterpretParams()` runs it on any machine."""
    tokens = (q, k, v, widen(log_decay), reset)
    chunk_scan.require("decayed_outer_product", tokens, state)
    form = chunk_scan.OnTPU(OuterProduct(normaliser), chunk_length(q, chunk_size), interpret)
    return platforms.scan(platforms.Forms(form), tokens, state)


def form(tokens, state, size: int, normaliser: bool) -> chunk_scan.OnTPU | None:
    """The kernels, if they suit the tokens."""
    suit = chunk_scan.suits(tokens, state)
    return chunk_scan.OnTPU(OuterProduct(normaliser), size) if suit else None


class OuterProduct(NamedTuple):
    """q, k [C, K], v [C, V], log_decay [1, C] or [C, K], document [1, C], S [V, K] or [V + 1, K]"""

    normaliser: bool
    name: str = "decayed_outer_product"

    def results(self, q, k, v, log_decay, reset):
        y = jax.ShapeDtypeStruct(v.shape, v.dtype)
        norm = jax.ShapeDtypeStruct(v.shape[:3], log_decay.dtype)
        return (y, norm) if self.normaliser else (y,)

    def forward(self, q, k, v, log_decay, document, S):
        v, decay = self._written(v), _decay(log_decay, document)
        A = decay.scores(q, k).astype(v.dtype)
        y = decay.read(q, S) + product(A, v)
        return self._read(y), decay.whole * S + decay.write(k, v)

    def backward(self, q, k, v, log_decay, document, S, *cotangents):
        *dy, D = cotangents
        dy = jnp.concatenate([dy[0].astype(D.dtype), *map(column, dy[1:])], 1)
        V, v, decay = v.shape[1], self._written(v), _decay(log_decay, document)
        A, few = decay.scores(q, k), dy.astype(v.dtype)
        dq, dk, pairs = decay.scores_gradient(q, k, A, rows_by_rows(few, v))
        dq_read, dS, reads = decay.read_gradient(q, S, dy)
        dk_write, dv, writes = decay.write_gradient(k, v, D)
        dv += columns_by_columns(A.astype(v.dtype), few)
        d_log_decay = decay.log_decay_gradient(pairs + reads, writes, S, D)
        return dq + dq_read, dk + dk_write, dv[:, :V], d_log_decay, dS + decay.whole * D

    def _written(self, v):
        return jnp.concatenate([v, jnp.ones_like(v[:, :1])], 1) if self.normaliser else v

    def _read(self, y):
        return (y[:, :-1], row(y[:, -1:])) if self.normaliser else (y,)


def _decay(log_decay, document):
    kind = HeadDecay if log_decay.shape[0] == 1 else ChannelDecay
    return kind(log_decay, document)
