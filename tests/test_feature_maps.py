"""Feature maps are what their papers define; linear attention is attention under such a map."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import assert_close
from seqlab.errors import ConfigError
from seqlab.layers import feature_maps
from seqlab.layers.mixers import linear_attention

B, T, H, D = 2, 5, 3, 8
KINDS = typing.get_args(feature_maps.Kind)


def arrays(n=2):
    return np.random.default_rng(0).normal(size=(n, B, T, H, D)).astype(np.float32)


def build(kind, **fields):
    return feature_maps.Config(kind, **fields).build(D, H, rngs=nnx.Rngs(0))


def kernel(kind):
    q, k = arrays()
    phi = build(kind)
    return np.sum(phi(q) * phi(k), -1), np.sum(q * k, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_the_width_that_is_said_and_the_dtype_that_came(kind):
    for fields in ({}, {"width": 6, "per_head": True, "bias": False}):
        phi = build(kind, **fields)
        y = phi(jnp.asarray(arrays()[0], jnp.bfloat16))
        assert (y.shape, y.dtype) == ((B, T, H, phi.width), jnp.bfloat16)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in feature_maps.SIGNED])
def test_scores_of_a_positive_map_are_not_negative(kind):
    assert (kernel(kind)[0] >= 0).all()


def test_taylor_is_the_second_order_expansion_of_exp():
    features, scores = kernel("taylor")
    assert_close(features, 1 + scores / D**0.5 + scores**2 / (2 * D))


def test_rebased_is_the_square_of_normed_scores():
    q, k = ((a - a.mean(-1, keepdims=True)) for a in arrays())
    q, k = (a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-5) for a in (q, k))
    assert_close(kernel("rebased")[0], np.sum(q * k, -1) ** 2 / D)


def test_dpfp_multiplies_each_half_line_with_its_neighbours():
    x = arrays()[0]
    r = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)
    expected = [r[..., i] * r[..., i - j] for j in (1, 2, 3) for i in range(2 * D)]
    assert_close(build("dpfp", nu=3)(x), np.stack(expected, -1))


def test_hedgehog_starts_as_softmaxes_of_both_signs():
    x = arrays()[0]
    e = np.exp(x)
    both = np.concatenate([e**2, e**-2], -1)
    assert_close(build("hedgehog")(x), both / both.sum(-1, keepdims=True))
    apart = [e / e.sum(-1, keepdims=True), 1 / e / (1 / e).sum(-1, keepdims=True)]
    assert_close(build("hedgehog", joint=False)(x), np.concatenate(apart, -1))


def test_elementwise_products_are_of_each_heads_own_projections():
    phi, x = build("elementwise_product", per_head=True, width=6), arrays()[0]
    one, two = (
        np.stack([x[:, :, h] @ p.weight[h] for h in range(H)], 2) for p in (phi.first, phi.second)
    )
    assert one.shape[-1] == 6
    assert_close(phi(x), one * two)


def test_linear_attention_weighs_values_by_the_kernel_of_the_features():
    config = linear_attention.Config(heads=H, kv_heads=1, expand_k=0.75, chunk_size=16)
    mixer = config.build(24, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(B, 40, 24)).astype(np.float32)
    split = lambda a, n: np.asarray(a).reshape(B, 40, n, -1)
    elu = lambda a: np.where(a > 0, a + 1, np.exp(np.minimum(a, 0)))
    q, k = elu(split(mixer.q(x), H)), elu(split(mixer.k(x), 1))
    scores = np.einsum("bihk,bjgk->bhij", q, k) * np.tri(40)
    scores /= scores.sum(-1, keepdims=True) + config.eps
    y = np.einsum("bhij,bjgv->bihv", scores, split(mixer.v(x), 1))
    y = y.reshape(B, 40, -1).astype(np.float32)
    assert_close(jax.jit(lambda m, x: m(x)[0])(mixer, x), mixer.out(y))


def test_a_map_whose_scores_cancel_is_refused_with_a_normaliser():
    with pytest.raises(ConfigError, match="identity"):
        linear_attention.Config(feature_map=feature_maps.Config("identity"))
