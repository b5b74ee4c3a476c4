"""Causal depthwise convolution with few taps, as shifted products; documents do not mix."""

import functools

import jax
import jax.numpy as jnp

from seqlab.parallel.halo import with_halo


def short_conv(
    weight: jax.Array, x: jax.Array, reset: jax.Array, inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y_t = sum_j weight[j] x_{t - W + 1 + j} over the taps j that lie in the document of token t.

    weight  [W, D], the last tap for the token itself
    x       [B, T, D]
    reset   [B, T] bool, true where a document starts
    inputs  [B, W - 1, D], what came before x in its document, zero where nothing did

    Returns y [B, T, D], and the last W - 1 inputs of the document at the end, in the dtype of
    `inputs`. Where the ambient mesh splits time, they travel from each device to the next.
    """
    W = weight.shape[0]
    end = functools.partial(_last, n=W - 1)
    return with_halo(_with_inputs, end, W - 1, (x, reset), inputs, (weight,))


def _with_inputs(x, reset, weight, inputs):
    W, T = weight.shape[0], x.shape[1]
    past = jnp.concatenate([inputs.astype(x.dtype), x], 1)  # [B, W - 1 + T, D]
    reset = jnp.pad(reset, [(0, 0), (W - 1, 0)])
    last = _last(past[:, T:], reset[:, T:], W - 1)
    return _convolved(weight, past, jnp.cumsum(reset, 1)), last.astype(inputs.dtype)


def _last(x, reset, n):
    """The last n of at least n tokens, zero where they are not of the last one's document."""
    x, reset = (a[:, a.shape[1] - n :] for a in (x, reset))
    later = jnp.cumsum(reset[:, ::-1], 1)[:, ::-1] - reset  # documents that start after the token
    return jnp.where((later == 0)[..., None], x, 0)


@jax.custom_vjp
def _convolved(weight: jax.Array, past: jax.Array, document: jax.Array) -> jax.Array:
    """y [B, T, D] of the T tokens in `past` [B, W - 1 + T, D] behind the W - 1 before them, with
    the same number in `document` [B, W - 1 + T] for tokens of one document.

    The backward pass is written out because autodiff's sums over the tokens, one for each tap, took
    ten times as long as the rest of it on a CPU.
    """
    return _shifted(weight, past, document)


def _shifted(weight, past, document):
    W, T = weight.shape[0], past.shape[1] - weight.shape[0] + 1
    y = weight[-1] * past[:, W - 1 :]
    for tap, same in enumerate(_same(document, W)):
        y += jnp.where(same[..., None], weight[tap] * past[:, tap : tap + T], 0)
    return y


def _forward(weight, past, document):
    return _shifted(weight, past, document), (weight, past, document)


def _backward(saved, dy):
    weight, past, document = saved
    W, T = weight.shape[0], dy.shape[1]
    seen = [same.astype(dy.dtype) for same in (*_same(document, W), jnp.ones(dy.shape[:2], bool))]
    d_weight = jnp.stack(
        [jnp.einsum("bt,btd->d", m, past[:, tap : tap + T] * dy) for tap, m in enumerate(seen)]
    )
    beyond = lambda a: jnp.pad(a, [(0, 0), (W - 1, W - 1)] + [(0, 0)] * (a.ndim - 2))
    dy, seen = beyond(dy), [beyond(m) for m in seen]
    d_past = jnp.zeros((), past.dtype)
    for tap in range(W):
        at = slice(W - 1 - tap, W - 1 - tap + past.shape[1])  # the token that reads this one
        d_past += weight[tap] * dy[:, at] * seen[tap][:, at, None]
    return d_weight.astype(weight.dtype), d_past, None


_convolved.defvjp(_forward, _backward)


def _same(document, W):
    """For each tap but the last: whether it reads from the token's own document, [B, T]."""
    T = document.shape[1] - W + 1
    return [document[:, tap : tap + T] == document[:, W - 1 :] for tap in range(W - 1)]
