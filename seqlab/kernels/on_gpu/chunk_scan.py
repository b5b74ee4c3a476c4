"""The scan over chunks as GPU kernels, forward and backward.

States follow one another in one kernel (`states`); all else happens in all chunks at once: scores
before it, outputs after it, gradients after the walk back. So kernels hand on in memory what a
chunk needs: scores, states, and in the delta rule the inverse and what it makes of values.

Block sizes are guesses held to what fits a program on Hopper: with K = V = 128, chunks of 64 and
bfloat16, Triton for sm_90 takes at most 140 of 228 KB of shared memory and 255 registers a thread.
What then spills is 0.9 KB a thread in `channel_scores`, 0.5 in `channel_gradient`, 8 bytes in
`chunk_couplings`; nothing in the others. In float32, which tensor cores would round, kernels spill
up to 16 KB: there the form in XLA is taken, unless they are named.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.errors import ModelError
from seqlab.kernels.on_gpu import channel_decay, head_decay, states, trust, unit_lower
from seqlab.kernels.on_gpu.chunks import Sizes
from seqlab.kernels.on_gpu.couplings import Cotangents, Solved, couplings

WIDTHS = (64, 128, 256, 512)  # of values; of keys all but the last
LONGEST = 128  # chunks: scores of longer ones do not fit a program's registers
KERNELS = (
    *("head_scores", "head_gradient"),
    *("channel_operands", "channel_scores", "channel_pairs", "channel_gradient"),
    *("chunk_states", "chunk_states_backward", "chunk_outputs", "chunk_couplings"),
    *("chunk_inverse", "chunk_corrections"),
)
DTYPES = ("bfloat16",)  # of tokens that they are taken for
OF_CHANNELS = "_of_channels"  # in `trust`, kernels with one decay a channel


class OnGPU(NamedTuple):
    """The kernels as a form of `platforms.scan`, for tokens (q, k, v, log_decay, reset) or, in the
    delta rule, (q, k, v, beta, log_decay, reset); all but the first three float32 or wider.
    `others` as in `Sizes`."""

    size: int
    interpret: Any = False
    others: tuple = ()

    def run(self, tokens, state):
        return self._forward(tokens, state, keep=False)[0]

    def keeping(self, tokens, state):
        return self._forward(tokens, state, keep=True)

    def _forward(self, tokens, state, keep: bool):
        c = _Chunks(tokens, *self)
        v, W = c.v, None
        if c.beta is not None:
            v, W = c.corrections(None)
        entering, last, w = states.walk(c.sizes, c.x.operands, v, W, state, keep)
        like = jax.ShapeDtypeStruct(c.v.shape, c.v.dtype)
        y, norm = states.read(c.sizes, c.x.operands, w, entering, like)
        return (y if norm is None else (y, c.as_token(norm)), last), entering

    def backward(self, tokens, entering, d_y, d_state):
        c = _Chunks(tokens, *self)
        dy, d_norm = d_y if isinstance(d_y, tuple) else (d_y, None)
        d_norm = None if d_norm is None else c.as_numbers(d_norm)
        w, W = (c.v, None) if c.beta is None else c.corrections(entering)
        like = jax.ShapeDtypeStruct(w.shape, w.dtype)
        x = c.x.operands
        leaving, dw, d_first = states.walk_back(c.sizes, x, W, dy, d_norm, d_state, like)
        solved = None if c.beta is None else Solved(c.inverse, dw, c.beta, c.v)
        given = Cotangents(entering, leaving, w, dy, d_norm, None)
        given, dv, d_beta = couplings(c.sizes, given, c.documents, solved)
        found = c.decay.gradient(c.sizes, c.x, given, *c.gates)
        d = [found.q, found.k, dw if c.beta is None else dv]
        if c.beta is not None:
            d.append(c.as_token(d_beta + found.beta))
        return (*d, c.as_decay(found.log_decay), None), d_first


class _Chunks:
    """What the forward and the backward pass both need."""

    def __init__(self, tokens, size: int, interpret, others):
        self.q, self.k, self.v, *beta, log_decay, reset = tokens
        (B, T, G, K), (H, V) = self.q.shape, self.v.shape[2:]
        self.sizes = Sizes(B, T, G, H, K, V, size, interpret, others)
        self.beta = self.as_numbers(beta[0]) if beta else None
        by_chunk = self._whole(reset).reshape(B, -1, size)
        self.documents = jnp.cumsum(by_chunk, 2, dtype=jnp.int32).reshape(B, -1)
        one = log_decay.shape[3] == 1
        self.decay = head_decay if one else channel_decay
        self.gates = self.as_numbers(log_decay[..., 0]) if one else log_decay, self.documents
        self.x = self.decay.prepared(self.sizes, self.q, self.k, *self.gates, bool(beta))
        if beta:
            self.inverse = unit_lower.inverse(self.sizes, self.x.overlaps, self.beta)

    def corrections(self, entering):
        """U and W of `states`; of the states that enter, w in the place of U."""
        solved = self.inverse, self.beta, self.x.operands.start
        return unit_lower.corrections(self.sizes, *solved, self.v, self.x.reading, entering)

    def as_numbers(self, a):
        """[B, T, H] -> numbers"""
        return jnp.swapaxes(self._whole(a), 1, 2)

    def as_token(self, a):
        return jnp.swapaxes(a, 1, 2)[:, : self.sizes.T]

    def as_decay(self, a):
        return a if a.ndim == 4 and self.decay is channel_decay else self.as_token(a)[..., None]

    def _whole(self, a):
        more = self.sizes.tokens - self.sizes.T
        return jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2))


def suits(tokens: tuple, size: int) -> bool:
    """Whether the kernels can run q, k, v, ...: of what they cannot, XLA makes its own."""
    q, k, v = tokens[:3]
    widths = q.shape[3] in WIDTHS[:-1] and v.shape[3] in WIDTHS
    alike = q.dtype == k.dtype == v.dtype != jnp.float16
    return alike and widths and size <= LONGEST


def usable(name: str, tokens: tuple, size: int) -> bool:
    """Whether they suit, and are to be believed on the GPU at hand (see `trust`)."""
    kernels, dtype = name + (OF_CHANNELS if tokens[-2].shape[3] > 1 else ""), tokens[0].dtype
    tried = jnp.dtype(dtype).name in trust.DTYPES.get(kernels, ())
    return suits(tokens, size) and tried and trust.trusted(kernels, dtype)


def require(name: str, tokens: tuple, size: int) -> None:
    """ModelError where they cannot."""
    if not suits(tokens, size):
        q, _, v, *_ = tokens
        raise ModelError(
            f"The GPU kernel of {name} takes keys and values of one dtype and of width "
            f"{', '.join(map(str, WIDTHS))} (keys less than the last), in chunks of at "
            f"most {LONGEST}, not {q.dtype}{list(q.shape)} and {v.dtype}{list(v.shape)} in chunks "
            f"of {size}: leave the implementation to None."
        )


def tokens_to_try(dtype, channels: bool, B: int = 1, T: int = 96, G: int = 1, H: int = 2, K=64):
    """q, k, v, beta, log_decay, reset, state: a chunk and a part of one, of two heads that share
    their keys, with documents and gates that wipe out everything."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, heads, K)) for heads in (G, G, H))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    weak = -0.3 * rng.exponential(size=(B, T, H, K if channels else 1))
    gates = 2 * rng.random((B, T, H)), np.where(rng.random(weak.shape) < 0.1, -80.0, weak)
    wide = jnp.promote_types(dtype, jnp.float32)
    few = [jnp.asarray(a, dtype) for a in (q, k, v)]
    reset, state = jnp.asarray(rng.random((B, T)) < 0.06), rng.normal(size=(B, H, K, K))
    return *few, *(jnp.asarray(a, wide) for a in gates), reset, jnp.asarray(state, wide)
