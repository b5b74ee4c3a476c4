"""The chunked form in XLA: products inside a chunk, a scan of states between chunks.

Within a chunk, with G the inclusive cumulative log decay, Gamma its last row and S what enters:

    A_ij = q_i . (exp(G_i - G_j) k_j)  for j <= i in the same document
    y    = (q e^G) S + A v
    S'   = e^Gamma S + (k e^(Gamma - G))^T v

(Yang et al., 2023; Dao & Gu, 2024.) The backward pass keeps only the states at chunk boundaries and
recomputes the rest of a chunk. Its gradients are written out (D is the cotangent of S'):

    dA = dy v^T   dq = row(dA, k) + e^G dy S^T     dk = col(dA, q) + e^(Gamma - G) v D^T
    dv = A^T dy + (k e^(Gamma - G)) D              D_prev = e^Gamma D + (q e^G)^T dy
    a log decay collects q dq - k dk of later tokens, k dk of earlier ones that reach S', and D S

How A and its two products are formed depends on the decay: see `per_head` and `per_channel`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.decayed_outer_product import per_channel, per_head
from seqlab.kernels.decayed_outer_product.decay import BLOCK
from seqlab.kernels.precision import widen
from seqlab.parallel.transitions import Diagonal, compose


def chunked(q, k, v, log_decay, reset, state, *, chunk_size: int = 64):
    """The definition's arguments and results; any T, any decay from -1e-6 to -80 and beyond."""
    T, kind = q.shape[1], _kind(log_decay)
    chunks = _chunks(q, k, v, log_decay, reset, chunk_size)
    y, state = _scan_chunks(kind, chunks, state)  # pyright: ignore[reportGeneralTypeIssues]
    y = jnp.moveaxis(y, 0, 1).reshape(v.shape[0], -1, *v.shape[2:])[:, :T]
    return y.astype(v.dtype), state


def transition(q, k, v, log_decay, reset, *, chunk_size: int = 64) -> Diagonal:
    """What these tokens do to the state [B, H, K, V] that enters them."""
    chunks = _chunks(q, k, v, log_decay, reset, chunk_size)
    return compose(jax.vmap(_kind(log_decay).transition)(*chunks))


def _kind(log_decay):
    return per_head if log_decay.shape[-1] == 1 else per_channel


def _chunks(q, k, v, log_decay, reset, chunk_size):
    """The tokens cut in chunks along a new leading axis; gates wide."""
    size = min(chunk_size, q.shape[1])
    size += -size % BLOCK
    cut = functools.partial(_cut, size=size)
    return cut(q), cut(k), cut(v), cut(widen(log_decay)), cut(reset)


def _cut(a, size):
    """[B, T, ...] -> [N, B, C, ...]; the padding neither decays nor writes nor resets."""
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_chunks(kind, chunks, state):
    """chunks ([N, B, C, ...], ...), state [B, H, K, V] -> y [N, B, C, H, V], state"""
    state, y = lax.scan(lambda S, chunk: kind.forward(*chunk, S)[::-1], state, chunks)
    return y, state


def _forward(kind, chunks, state):
    def step(S, chunk):
        y, after = kind.forward(*chunk, S)
        return after, (y, S)

    last, (y, entering) = lax.scan(step, state, chunks)
    return (y, last), (chunks, entering)


def _backward(kind, saved, cotangents):
    chunks, entering = saved
    dy, d_last = cotangents

    def step(D, xs):
        chunk, S, dy = xs
        *d_tokens, D = kind.backward(*chunk, S, dy, D)
        return D, tuple(d_tokens)

    D, d_tokens = lax.scan(step, d_last, (chunks, entering, dy), reverse=True)
    d_tokens = [d.astype(a.dtype) for d, a in zip(d_tokens, chunks, strict=False)]
    return (*d_tokens, None), D


_scan_chunks.defvjp(_forward, _backward)
