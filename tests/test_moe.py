"""Mixtures of experts: against a loop over experts, transformers' blocks, and one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from seqlab import settings
from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError
from seqlab.kernels.experts import IMPLEMENTATIONS
from seqlab.layers import auxiliary, ffn, moe
from seqlab.models import block, lm
from seqlab.models.parameters import axes, bind, parameters
from seqlab.parallel.mesh import use_mesh, weight_shardings

D = 12
CONFIGS = {
    "mixtral": moe.Config(experts=5, top_k=2, width=7),
    "one of many": moe.Config(experts=40, top_k=1, width=3, normalize=False),
    "deepseek": moe.Config(
        experts=8,
        top_k=3,
        width=6,
        score="sigmoid",
        correction=True,
        groups=4,
        top_groups=2,
        scale=2.5,
        shared=ffn.Config(width=9),
    ),
    "qwen3_next": moe.Config(
        experts=6, top_k=2, width=5, shared=ffn.Config(width=8), shared_gate=True
    ),
    "nemotron_h": moe.Config(
        experts=4, top_k=2, width=6, activation="relu2", gated=False, latent=10, score="sigmoid"
    ),
}


def built(config, seed=0, dtype=np.float64):
    model = config.build(D, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape), dtype), model)


def tokens(B=2, T=9, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(7).normal(size=(B, T, D)), dtype)


def by_hand(model, x):
    """One token and one expert at a time."""
    chosen, share = model.choose(x)
    act = ffn.ACTIVATIONS[model.config.activation]
    inner = x if model.latent_down is None else model.latent_down(x)
    y = np.zeros(inner.shape)
    for at in np.ndindex(*x.shape[:-1]):
        for e, g in zip(chosen[at], share[at], strict=True):
            h = inner[at] @ model.up[...][e]
            h = act(h) if model.gate is None else act(inner[at] @ model.gate[...][e]) * h
            y[at] += g * (h @ model.down[...][e])
    y = y if model.latent_up is None else model.latent_up(y)
    if model.shared is not None:
        gate = 1 if model.shared_gate is None else jax.nn.sigmoid(model.shared_gate(x))
        y += gate * model.shared(x)
    return y


def with_gradients(model, x):
    loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
    return jax.jit(lambda model, x: (model(x), jax.grad(loss, argnums=(0, 1))(model, x)))(model, x)


@pytest.mark.parametrize("implementation", [None, "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_equals_a_loop_over_its_experts(name, implementation):
    with jax.enable_x64(True):
        model = built(dataclasses.replace(CONFIGS[name], implementation=implementation))
        x = tokens(1, 5)
        assert_close(jax.jit(lambda m, x: m(x))(model, x), by_hand(model, x))


@functools.cache
def defined(name, even):
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIGS[name], implementation="dense")
        return with_gradients(loaded(built(config), even), tokens())


def loaded(model, even):
    """The model; or one in which all tokens choose the same experts."""
    weights = parameters(model)
    router = weights["router.weight"] * (1.0 if even else 0.0)
    return bind(model, {**weights, "router.weight": router})


LOADS = [(name, True) for name in CONFIGS] + [("mixtral", False), ("deepseek", False)]


@pytest.mark.parametrize("name, even", LOADS)
@pytest.mark.parametrize("implementation", ["blocks", "ragged"])
def test_implementations_equal_the_definition(implementation, name, even):
    """Outputs, and the gradients of every weight and of x."""
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIGS[name], implementation=implementation)
        y, gradients = with_gradients(loaded(built(config), even), tokens())
        y_, gradients_ = defined(name, even)
        assert y.dtype == jnp.float64
        assert_close(y, y_)
        assert_close(jax.tree.leaves(gradients), jax.tree.leaves(gradients_), GRADIENT)


def test_a_token_gets_the_same_alone_and_among_others():
    with jax.enable_x64(True):
        model, x = built(CONFIGS["deepseek"]), tokens()
        run = jax.jit(lambda m, x: m(x))
        whole = run(model, x)
        for t in range(x.shape[1]):
            assert_close(run(model, x[:, t : t + 1]), whole[:, t : t + 1])


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_among_equal_scores_the_first_experts_win(name):
    model = CONFIGS[name].build(D, rngs=nnx.Rngs(0))
    model = jax.tree.map(jnp.zeros_like, model)
    chosen, share = jax.jit(lambda m, x: m.choose(x))(model, tokens(dtype=np.float32))
    expected = jnp.broadcast_to(jnp.arange(model.config.top_k), chosen.shape)
    assert (chosen == expected).all()
    assert_close(share, jnp.full(share.shape, model.config.scale / model.config.top_k))


def test_bfloat16_tokens_are_routed_in_float32():
    model, x = built(CONFIGS["mixtral"], dtype=np.float32), tokens(dtype=jnp.bfloat16)
    assert model(x).dtype == jnp.bfloat16
    chosen, share = model.choose(x)
    chosen_, share_ = model.choose(x.astype(jnp.float32))
    assert share.dtype == jnp.float32 and (chosen == chosen_).all() and (share == share_).all()


def theirs(family):
    """A mixture of transformers, random, and the config and the weights of ours that equals it."""
    import transformers as t
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

    ours = functools.partial(moe.Config, top_k=3, width=6)
    sigmoid = {"score": "sigmoid", "correction": True, "groups": 4, "top_groups": 2, "scale": 2.5}
    shape = {"hidden_size": D, "num_experts_per_tok": 3, "moe_intermediate_size": 6}
    groups = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    if family == "deepseek_v3":
        block = DeepseekV3MoE(t.DeepseekV3Config(**shape, **groups, n_shared_experts=2))
        return block, ours(experts=8, **sigmoid, shared=ffn.Config(width=12))
    if family == "nemotron_h":
        block = NemotronHMoE(
            t.NemotronHConfig(
                **shape,
                **groups,
                moe_latent_size=10,
                moe_shared_expert_intermediate_size=12,
                layers_block_type=["moe"],
            )
        )
        plain = {"activation": "relu2", "gated": False}
        return block, ours(
            experts=8, **sigmoid, **plain, latent=10, shared=ffn.Config(width=12, **plain)
        )
    if family == "jamba":
        config = t.JambaConfig(
            hidden_size=D, intermediate_size=6, num_experts=5, num_experts_per_tok=3
        )
        return JambaSparseMoeBlock(config), ours(experts=5, normalize=False)
    config = t.Qwen3NextConfig(**shape, num_experts=5, shared_expert_intermediate_size=12)
    return Qwen3NextSparseMoeBlock(config), ours(
        experts=5, shared=ffn.Config(width=12), shared_gate=True
    )


NAMES = {
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "correction",
    "experts.down_proj": "down",
    "experts.up_proj": "up",
    "fc1_latent_proj.weight": "latent_down.weight",
    "fc2_latent_proj.weight": "latent_up.weight",
    "shared_expert_gate.weight": "shared_gate.weight",
}


def translated(tensors):
    """Transposed and split, nothing else."""
    ours = {}
    for name, tensor in tensors.items():
        array = jnp.asarray(np.moveaxis(tensor.numpy(), -1, -2) if tensor.ndim > 1 else tensor)
        if name == "experts.gate_up_proj":
            ours["gate"], ours["up"] = jnp.split(array, 2, -1)
        else:
            name = NAMES.get(name, name.replace("shared_experts.", "shared_expert."))
            shared = name.replace("shared_expert.", "shared.").replace("_proj", "")
            ours[shared] = array
    return ours


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h", "jamba", "qwen3_next"])
def test_a_mixture_equals_transformers(family):
    torch.manual_seed(0)
    block, config = theirs(family)
    block = block.double().eval()
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.normal_(0, 0.5)
    with jax.enable_x64(True):
        model = config.build(D, rngs=nnx.Rngs(0))
        model, x = bind(model, translated(block.state_dict())), tokens()
        with torch.no_grad():
            expected = block(torch.tensor(np.asarray(x))).numpy()
        y = model(x)
    # their routers round to float32
    assert_close(y.astype(jnp.float32), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sharded_mixture_equals_one_device(implementation):
    with jax.enable_x64(True):
        config = dataclasses.replace(
            CONFIGS["deepseek"], width=8, shared=ffn.Config(width=8), implementation=implementation
        )
        model, x = built(config), tokens(2, 8)
        expected = with_gradients(model, x)
        with use_mesh(data=2, seq=2, model=2) as mesh:
            weights = parameters(model)
            shapes = {name: a.shape for name, a in weights.items()}
            placed = jax.device_put(weights, weight_shardings(shapes, axes(model), mesh))
            y, gradients = with_gradients(bind(model, placed), x)
        assert_close(y, expected[0])
        assert_close(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), GRADIENT)


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_training_hears_how_evenly_experts_are_used(name):
    config = dataclasses.replace(CONFIGS[name], aux_scale=0.5)
    model, x = built(config, dtype=np.float32), tokens(dtype=np.float32)
    with auxiliary.collect() as found:
        model(x)
    scores = np.asarray(model.router(x), np.float64)
    scores = np.exp(scores) if config.score == "softmax" else 1 / (1 + np.exp(-scores))
    share = np.mean(scores / scores.sum(-1, keepdims=True), (0, 1))
    used = np.bincount(np.ravel(model.choose(x)[0]), minlength=config.experts) / (2 * 9)
    expected = config.experts * np.sum(share * used)
    assert_close(found["load_balance"].value, np.float32(expected))
    assert_close(found["load_balance"].loss, np.float32(0.5 * expected))


def test_a_model_holds_mixtures_and_its_config_is_json():
    mixer = {"mixer": "attention", "heads": 2}
    pattern = (mixer, {"mixer": mixer, "ffn": {"ffn": "mlp", "width": 8}})
    config = settings.read(
        lm.Config,
        {"vocab": 11, "d_model": D, "pattern": pattern, "ffn": {"ffn": "moe", "experts": 3}},
    )
    assert isinstance(config.ffn, moe.Config) and isinstance(config.pattern[1], block.Config)
    assert settings.read(lm.Config, settings.plain(config)) == config
    model = config.build(rngs=nnx.Rngs(0))
    assert model.blocks[0].ffn.up.shape == (1, 3, D, 32)
    logits, _ = jax.jit(lambda m, t: m(t))(model, jnp.zeros((1, 4), jnp.int32))
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"experts": 0}, "experts"),
        ({"top_k": 5}, "top_k"),
        ({"experts": 8, "groups": 3}, "groups"),
        ({"experts": 4, "groups": 4}, "groups"),
        ({"groups": 2, "top_groups": 3}, "top_groups"),
        ({"experts": 8, "groups": 4, "top_groups": 1, "top_k": 3}, "top_k"),
        ({"shared_gate": True}, "shared"),
        ({"scale": float("nan")}, "scale"),
        ({"aux_scale": -0.1}, "aux_scale"),
        ({"experst": 3}, "experst"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused_by_name(fields, says):
    with pytest.raises(ConfigError, match=says):
        settings.read(moe.Config, fields)


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(ConfigError, match="blocks"):
        moe.Config(implementation="block").build(D, rngs=nnx.Rngs(0))(tokens(dtype=np.float32))
