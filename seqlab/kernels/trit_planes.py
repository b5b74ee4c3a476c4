"""Matrices as sums of a few planes of -1, 0 and 1, each with a scale per group of inputs: PTQTP
(Xiao et al., 2025), which needs no data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 128  # inputs that share their scales
ROUNDS, TOLERANCE = 50, 1e-4  # of the fit: at most so many, or until scales move no more than that


@functools.partial(jax.jit, static_argnums=(1, 2))
def fit(weight: jax.Array, planes: int, group: int = GROUP) -> tuple[jax.Array, jax.Array]:
    """Trits [P, K, N] int8 and scales [P, G, N] whose `restored` is near weight [K, N].

    G = K / group, rounded up. By turns, for each output and group: the scales that fit the trits
    best (least squares), and for each weight the trits whose sum is nearest, of those as near the
    ones with most zeros. The error never rises. All planes start as the signs. Where float64 is
    enabled, it is what the fit computes in.
    """
    K, N = weight.shape
    short = -K % group
    grouped = lambda a: jnp.pad(a, ((0, short), (0, 0))).reshape(-1, group, N)
    w, exists = grouped(weight.astype(float)), grouped(jnp.ones((K, N), bool))
    unit = jnp.mean(jnp.abs(w), 1, keepdims=True)  # scales are in units of it: tolerances mean that
    w = w / jnp.where(unit > 0, unit, 1)

    def more(carry):
        i, _, _, moved = carry
        return (i < ROUNDS) & (moved > TOLERANCE)

    def step(carry):
        i, trits, before, _ = carry
        scales = _scales(w, trits)
        return i + 1, _trits(w, scales), scales, jnp.max(jnp.abs(scales - before))

    signs = jnp.where(exists, jnp.where(w < 0, -1, 1), 0).astype(jnp.int8)
    start = (
        0,
        jnp.stack([signs] * planes),
        jnp.zeros((planes, *unit[:, 0].shape), w.dtype),
        jnp.inf,
    )
    _, trits, scales, _ = jax.lax.while_loop(more, step, start)
    return trits.reshape(planes, -1, N)[:, :K], scales * unit[:, 0]


def restored(trits: jax.Array, scales: jax.Array, group: int = GROUP) -> jax.Array:
    """The weights [K, N] that trits [P, K, N] and scales [P, G, N] stand for, in float32."""
    K = trits.shape[1]
    each = jnp.repeat(scales.astype(jnp.float32), group, 1)[:, :K]
    # plane by plane: of two sums over an axis that one product reads, XLA's CPU compiler of
    # jaxlib 0.10.2 makes wrong numbers
    return functools.reduce(
        jnp.add, (plane * scale for plane, scale in zip(trits, each, strict=True))
    )


def _scales(w: jax.Array, trits: jax.Array) -> jax.Array:
    """The scales [P, G, N] that fit w [G, group, N] best: (T^T T + ridge) a = T^T w.

    The ridge settles what equal planes leave open; it is 1e-8 in float64, as published. Of whole
    numbers below `group`, the matrix is never so near singular that it must grow.
    """
    T = trits.astype(w.dtype)
    gram = jnp.einsum("pgkn,qgkn->gnpq", T, T) + jnp.eye(len(T)) * jnp.finfo(w.dtype).eps ** 0.5
    right = jnp.einsum("pgkn,gkn->gnp", T, w)
    return jnp.moveaxis(jnp.linalg.solve(gram, right[..., None])[..., 0], -1, 0)


def _trits(w: jax.Array, scales: jax.Array) -> jax.Array:
    """The trits [P, G, group, N] whose sum, scaled, is nearest to w [G, group, N]."""
    every = sorted(itertools.product((0, 1, -1), repeat=len(scales)), key=np.count_nonzero)
    best, chosen = jnp.full(w.shape, jnp.inf, w.dtype), jnp.zeros(w.shape, jnp.int32)
    for number, row in enumerate(every):
        away = jnp.abs(w - jnp.tensordot(np.array(row, w.dtype), scales, 1)[:, None])
        chosen = jnp.where(away < best, number, chosen)
        best = jnp.minimum(away, best)
    return jnp.moveaxis(jnp.asarray(every, jnp.int8)[chosen], -1, 0)
