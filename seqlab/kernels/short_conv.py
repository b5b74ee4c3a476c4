"""Causal depthwise convolution with few taps, as shifted products; documents do not mix."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def short_conv(weight: jax.Array, past: jax.Array, document: jax.Array) -> jax.Array:
    """y_t = sum_j weight[j] past[t + j] over the taps j that lie in the document of token t.

    weight    [W, D], the last tap for the token itself
    past      [B, W - 1 + T, D], the T tokens behind the W - 1 before them
    document  [B, W - 1 + T] int, equal for tokens of one document

    Returns y [B, T, D]. The backward pass is written out because autodiff's sums over the tokens,
    one for each tap, took ten times as long as the rest of it on a CPU.
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


short_conv.defvjp(_forward, _backward)


def _same(document, W):
    """For each tap but the last: whether it reads from the token's own document, [B, T]."""
    T = document.shape[1] - W + 1
    return [document[:, tap : tap + T] == document[:, W - 1 :] for tap in range(W - 1)]
