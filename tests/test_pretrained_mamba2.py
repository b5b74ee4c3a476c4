"""Mamba-2 and its hybrids compute what transformers computes, and are exported to the bit."""

import dataclasses
import json

import pytest
import transformers

import seqlab
from seqlab.errors import ModelError
from seqlab.models.parameters import bind, parameters
from tests.hf_models import TINY, build, hold, rank_differently

HYBRID = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16}

CASES = {
    "mamba2 of two groups, with biases": lambda: transformers.Mamba2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=2,
        use_bias=True,
        time_step_limit=(0.1, 2.0),
    ),
    "mamba2 tied": lambda: transformers.Mamba2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=1,
        use_conv_bias=False,
        tie_word_embeddings=True,
    ),
    "bamba": lambda: transformers.BambaConfig(
        **TINY, **HYBRID, attn_layer_indices=[1], mlp_bias=True, mamba_proj_bias=True
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **TINY,
        **HYBRID,
        mamba_d_ssm=48,
        mamba_rms_norm=True,
        projectors_bias=True,
        attention_bias=True,
        embedding_multiplier=2.0,
        lm_head_multiplier=0.7,
        key_multiplier=0.6,
        attention_in_multiplier=1.3,
        attention_out_multiplier=0.8,
        ssm_in_multiplier=0.9,
        ssm_out_multiplier=1.2,
        ssm_multipliers=[0.5, 1.4, 0.8, 1.1, 0.7],
        mlp_multipliers=[0.9, 0.8],
    ),
    "falcon_h1 without a norm": lambda: transformers.FalconH1Config(
        **TINY | {"num_hidden_layers": 2}, **HYBRID, mamba_d_ssm=48, tie_word_embeddings=True
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **TINY,
        **HYBRID,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=4,
        shared_intermediate_size=20,
        embedding_multiplier=3.0,
        logits_scaling=0.8,
        residual_multiplier=0.6,
        attention_multiplier=0.3,
    ),
    "granitemoehybrid without experts, with rope": lambda: transformers.GraniteMoeHybridConfig(
        **TINY | {"num_hidden_layers": 2},
        **HYBRID,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=0,
        shared_intermediate_size=20,
        attention_multiplier=0.3,
        position_embedding_type="rope",
        tie_word_embeddings=True,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{name: size for name, size in TINY.items() if name != "num_hidden_layers"},
        head_dim=12,
        mamba_num_heads=6,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=12,
        moe_latent_size=20,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        mlp_bias=True,
    ),
    "zamba2": lambda: zamba2(use_shared_attention_adapter=True, use_mem_rope=True),
    "zamba2 without rope": lambda: zamba2(add_bias_linear=True, num_mem_blocks=1),
}


def zamba2(**more):
    """Two blocks, of which the second and the last but one layer share the first."""
    kinds = ["linear_attention", "hybrid", "hybrid", "hybrid", "linear_attention"]
    sizes = {"num_hidden_layers": len(kinds), "num_key_value_heads": 4, "n_mamba_heads": 8}
    described = {"mamba_ngroups": 2, "mamba_d_state": 16, "num_mem_blocks": 2, "adapter_rank": 4}
    return transformers.Zamba2Config(
        **TINY | sizes | described | more, layers_block_type=kinds, tie_word_embeddings=True
    )


@pytest.mark.parametrize("name", CASES)
def test_mamba2_and_its_hybrids_are_those_of_transformers(name, tmp_path):
    hold(CASES[name](), tmp_path, adjust=rank_differently)


OLDER = {
    "bamba": {"rope_parameters": None, "rope_theta": 10_000.0, "mamba_d_head": "auto"},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
        "time_step_limit": None,
        "mamba_d_head": "auto",
    },
    "nemotron_h": {
        "layers_block_type": None,
        "hybrid_override_pattern": "ME*-",
        "num_hidden_layers": 4,
        "head_dim": None,
        "attention_head_dim": 12,
        "mlp_hidden_act": None,
        "use_bias": None,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid", "mamba"]},
    "mamba2 tied": {"time_step_limit": [0.0, float("inf")]},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_spellings_mean_the_same(name, tmp_path):
    build(CASES[name](), tmp_path)
    read = lambda: dataclasses.replace(seqlab.load(tmp_path).config, published=None)
    today, file = read(), tmp_path / "config.json"
    raw = json.loads(file.read_text("utf-8"))
    assert raw | OLDER[name] != raw
    file.write_text(json.dumps(raw | OLDER[name]), "utf-8")
    assert read() == today


def test_shared_blocks_that_have_drifted_apart_are_not_exported(tmp_path):
    build(zamba2(), tmp_path / "theirs")
    model = seqlab.load(tmp_path / "theirs")
    weights = parameters(model)
    name = next(name for name in weights if name.endswith("mixer.q.base.weight"))
    changed = weights[name].at[-1].add(1)  # of the last repeat alone
    with pytest.raises(ModelError, match="share model.layers.1.shared_transformer"):
        seqlab.export_hf(bind(model, weights | {name: changed}), tmp_path / "exported")
