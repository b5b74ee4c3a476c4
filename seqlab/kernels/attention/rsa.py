"""Ring Self-Attention (Li et al., 2021): keys go around, then values; all scores of a device's
queries are in memory, T/P x T. Made for attention without a causal mask; the ring took its place.
"""

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.attention.meetings import shift
from seqlab.kernels.attention.visible import EMPTY, MASKED, visible
from seqlab.kernels.attention.xla import Options
from seqlab.kernels.precision import dot
from seqlab.parallel.mesh import SEQ


def ring_self_attention(options: Options, queries: tuple, keys: tuple, past: tuple | None):
    """y and log-sum-exp of this shard's tokens."""
    (q, *q_at), (k, v, *k_at) = queries, keys
    (B, T, H, K), G = q.shape, k.shape[2]
    q = q.reshape(B, T, G, H // G, K)

    def scored(k, position, document):
        at = [*(a[:, :, None] for a in q_at), position[:, None], document[:, None]]
        sees = visible(*at, **options.sight)
        scores = options.scores(dot("btgrk,bsgk->bgrts", q, k))
        return jnp.where(sees[:, None, None], scores, MASKED)

    weighed = lambda v, weights: dot("bgrts,bsgv->btgrv", weights.astype(v.dtype), v)
    scores = [_around(lambda held, _: scored(*held), (k, *k_at))]  # [P, B, G, R, T, S]
    if past is not None:
        scores.append(scored(past[0], *past[2:])[None])
    lse = jnp.maximum(_over_all(scores), EMPTY)
    weights = [jnp.exp(a - lse[..., None]) for a in scores]
    y = _around(weighed, v, weights[0]).sum(0)
    if past is not None:
        y += weighed(past[1], weights[1][0])
    y = y.reshape(B, T, H, v.shape[-1]).astype(q.dtype)
    return y, lse.transpose(0, 3, 1, 2).reshape(B, T, H)


def _around(f, held, beside=None):
    """[P, ...] of f(what a device holds at a step, beside[step])."""
    last = lax.axis_size(SEQ) - 1
    at = lambda n: jax.tree.map(lambda a: a[n], beside)

    def step(held, n):
        ahead = shift(held)
        return ahead, f(held, at(n))

    held, ys = lax.scan(step, held, jnp.arange(last))
    return jnp.concatenate([ys, f(held, at(last))[None]])


def _over_all(scores):
    """The log-sum-exp over steps and keys of some [N, B, G, R, T, S]."""
    parts = [jax.nn.logsumexp(a, (0, -1)) for a in scores]
    return jax.nn.logsumexp(jnp.stack(parts), 0)
