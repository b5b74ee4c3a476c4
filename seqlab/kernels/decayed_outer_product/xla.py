"""The chunked form in XLA: products inside a chunk, a scan of states between chunks.

Within a chunk, with G the inclusive cumulative log decay, Gamma its last row and S what enters:

    A_ij = q_i . (exp(G_i - G_j) k_j)  for j <= i in the same document
    y    = (q e^G) S + A v
    S'   = e^Gamma S + (k e^(Gamma - G))^T v

(Yang et al., 2023; Dao & Gu, 2024.) Gradients are written out (D is the cotangent of S'):

    dA = dy v^T   dq = row(dA, k) + e^G dy S^T     dk = col(dA, q) + e^(Gamma - G) v D^T
    dv = A^T dy + (k e^(Gamma - G)) D              D_prev = e^Gamma D + (q e^G)^T dy
    a log decay collects q dq - k dk of later tokens, k dk of earlier ones that reach S', and D S

How A and its two products are formed depends on the decay: see `per_head` and `per_channel`.
"""

import jax
import jax.numpy as jnp

from seqlab.kernels import chunk_scan
from seqlab.kernels.decay import chunk_length
from seqlab.kernels.decayed_outer_product import per_channel, per_head
from seqlab.kernels.precision import widen
from seqlab.parallel.transitions import Diagonal


def chunked(q, k, v, log_decay, reset, state, *, chunk_size: int = 64, normaliser: bool = False):
    """The definition's arguments and results; any T, any decay from -1e-6 to -80 and beyond."""
    tokens = (q, k, written(v, normaliser), widen(log_decay), reset)
    y, state = chunk_scan.scan_chunks(_kind(log_decay), tokens, state, chunk_length(q, chunk_size))
    return read(y, v, normaliser), state


def transition(
    q, k, v, log_decay, reset, *, chunk_size: int = 64, normaliser: bool = False
) -> Diagonal:
    """What these tokens do to the state that enters them."""
    tokens = (q, k, written(v, normaliser), widen(log_decay), reset)
    return chunk_scan.transition(_kind(log_decay), tokens, chunk_length(q, chunk_size))


def written(v: jax.Array, normaliser: bool) -> jax.Array:
    """What is written: v [B, T, H, V], beside it a column of ones if there is a normaliser."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1) if normaliser else v


def read(y: jax.Array, v: jax.Array, normaliser: bool):
    """What is returned, of what was read in float32 from what `written` wrote."""
    if not normaliser:
        return y.astype(v.dtype)
    return y[..., :-1].astype(v.dtype), y[..., -1]


def _kind(log_decay):
    return per_head if log_decay.shape[-1] == 1 else per_channel
