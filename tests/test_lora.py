"""Adapters beside linear maps, and their way back into the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import assert_close
from seqlab.errors import ModelError
from seqlab.layers.mixers import attention
from seqlab.linearize import lora
from seqlab.models import lm
from seqlab.models.parameters import axes, bind, parameters

TOKENS = jnp.arange(2 * 16).reshape(2, 16) % 31
CONFIG = lm.Config(
    vocab=31,
    d_model=32,
    pattern=(attention.Config(heads=4, kv_heads=2, qkv_bias=True),),
    repeats=3,
    before=(attention.Config(heads=4),),
)


@jax.jit
def logits(model, tokens):
    return model(tokens)[0]


@pytest.fixture(scope="module")
def model() -> lm.LM:
    return CONFIG.build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def wrapped(model) -> lm.LM:
    return lora.wrap(model, ("q", "k", "ffn.down"), 4, 8.0, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def trained(wrapped) -> lm.LM:
    """Adapters that are nowhere zero."""
    params, draw = parameters(wrapped), np.random.default_rng(0)
    for name in lora.adapters(wrapped):
        params[name] = jnp.asarray(draw.normal(0, 0.2, params[name].shape), jnp.float32)
    return bind(wrapped, params)


def test_new_adapters_change_nothing_and_share_every_weight(model, wrapped):
    ours, theirs = parameters(wrapped), parameters(model)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert (logits(wrapped, TOKENS) == logits(model, TOKENS)).all()


def test_adapters_are_named_and_stacked_like_the_weights_they_stand_beside(model, wrapped):
    new = parameters(wrapped).keys() - parameters(model).keys()
    maps = {"mixer.q", "mixer.k", "ffn.down"}
    at = {f"{block}.{name}" for block in ("before.0", "blocks.0") for name in maps}
    assert new == {f"{name}.lora_{ab}" for name in at for ab in "ab"} == lora.adapters(wrapped)
    shapes = {name: a.shape for name, a in parameters(wrapped).items()}
    assert shapes["blocks.0.mixer.k.lora_a"] == (3, 32, 4)
    assert shapes["blocks.0.mixer.k.lora_b"] == (3, 4, 16)
    assert axes(wrapped)["blocks.0.ffn.down.lora_a"] == ("ffn", None)
    bound = (6 / 32) ** 0.5
    a = np.asarray(parameters(wrapped)["blocks.0.mixer.q.lora_a"])
    assert 0.9 * bound < np.abs(a).max() <= bound


def test_an_adapter_adds_its_product_times_alpha_over_rank():
    one = lora.LoraLinear(
        lora.Linear(6, 5, ("embed", "heads"), bias=True, rngs=nnx.Rngs(0)), 2, 3.0, rngs=nnx.Rngs(1)
    )
    draw = np.random.default_rng(0)
    one.lora_b[...] = jnp.asarray(draw.normal(size=(2, 5)), jnp.float32)
    one.bias = nnx.Param(jnp.arange(5.0), axes=("heads",))
    x = jnp.asarray(draw.normal(size=(3, 4, 6)), jnp.float32)
    expected = x @ one.weight[...] + (x @ one.lora_a[...]) @ one.lora_b[...] * 1.5 + jnp.arange(5.0)
    assert_close(one(x), expected)


def test_merging_keeps_the_logits_and_is_an_ordinary_model(model, trained):
    merged = lora.merge(trained)
    assert parameters(merged).keys() == parameters(model).keys()
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert_close(logits(merged, TOKENS), logits(trained, TOKENS))
    assert np.abs(logits(merged, TOKENS) - logits(model, TOKENS)).max() > 0.1
    same = "blocks.0.mixer.v.weight"
    assert parameters(merged)[same] is parameters(model)[same]


def test_merging_sums_in_float32_and_casts_once(trained):
    narrow = parameters(trained)
    name = "blocks.0.mixer.q"
    narrow[f"{name}.weight"] = narrow[f"{name}.weight"].astype(jnp.bfloat16)
    a, b = narrow[f"{name}.lora_a"], narrow[f"{name}.lora_b"]
    with jax.default_matmul_precision("highest"):
        exact = narrow[f"{name}.weight"].astype(jnp.float32) + a @ b * 2.0
    merged = parameters(lora.merge(bind(trained, narrow)))[f"{name}.weight"]
    assert merged.dtype == jnp.bfloat16
    assert (merged == exact.astype(jnp.bfloat16)).mean() > 0.99


@pytest.mark.parametrize(
    ("linear", "name", "says"),
    [
        ("dense", "ffn.dawn", "No map of the model is called 'ffn.dawn': did you mean 'ffn.down'?"),
        ("bit", "q", "The model has linear='bit'"),
    ],
)
def test_what_cannot_be_adapted_is_said_in_a_sentence(linear, name, says):
    skeleton = lm.Config(vocab=31, d_model=32, pattern=CONFIG.pattern, linear=linear).skeleton()
    with pytest.raises(ModelError, match=says.replace("?", r"\?")):
        lora.wrap(skeleton, (name,), 2, 2.0, rngs=nnx.Rngs(0))
