"""The selective scan in XLA: chunk after chunk, whose states are all that is kept.

Decays [B, T, E, N] would be N times the activations, so they exist for a token (on a CPU) or for a
chunk (elsewhere) at a time, and the backward pass makes the states of a chunk again from the one
that entered it, as Gu & Dao, 2023, section 3.3.2, do inside a GPU.
"""

from jax import lax

from seqlab.kernels import chunk_scan
from seqlab.kernels.precision import widen
from seqlab.kernels.selective_scan import all_at_once, token_by_token


def chunked(u, dt, b, c, reset, A, state, *, chunk_size: int = 64):
    """The definition's arguments and results; any T."""
    y, state = form(u, chunk_size).run(prepared(u, dt, b, c, reset, A), state.mT)
    return y, state.mT


def prepared(u, dt, b, c, reset, A) -> tuple:
    """The definition's tokens as every form of `platforms.scan` takes them, beside the state
    [B, N, E]: u, dt [B, T, E], b, c [B, T, N], reset, A [N, E]."""
    return u, widen(dt), b[:, :, 0], c[:, :, 0], reset, widen(A).T


def form(u, chunk_size: int) -> chunk_scan.InXLA:
    """The form in XLA, in chunks no longer than u."""
    size = min(chunk_size, u.shape[1])
    return chunk_scan.InXLA(_Chunk, size, _as_given, _finished, widen, weights=1)


def _as_given(*tokens):
    return tokens


def _finished(y, u, *_):
    return y.astype(u.dtype)


class _Chunk:
    """One chunk, in states [B, N, E], so that vectors run along the channels."""

    @staticmethod
    def forward(*args):
        faster = {"cpu": token_by_token.forward, "default": all_at_once.forward}
        return lax.platform_dependent(*args, **faster)

    @staticmethod
    def backward(*args):
        faster = {"cpu": token_by_token.backward, "default": all_at_once.backward}
        return lax.platform_dependent(*args, **faster)
