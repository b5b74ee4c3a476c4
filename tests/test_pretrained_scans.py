"""Mamba, FalconMamba, Jamba, RecurrentGemma, LFM2 and RWKV-4 are what transformers computes, to
the bit when they are exported."""

import json

import pytest
import transformers

import seqlab
from seqlab.errors import ModelError
from tests.hf_models import TINY, build, hold

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
MAMBA = {**SMALL, "state_size": 8, "conv_kernel": 3}

CASES = {
    "mamba": lambda: transformers.MambaConfig(**MAMBA),
    "mamba with biases, untied": lambda: transformers.MambaConfig(
        **MAMBA,
        expand=3,
        time_step_rank=5,
        use_bias=True,
        use_conv_bias=False,
        tie_word_embeddings=False,
    ),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(
        **MAMBA, mixer_rms_eps=1e-3, expand=16, intermediate_size=48
    ),
    "jamba": lambda: transformers.JambaConfig(
        **TINY | {"num_hidden_layers": 4},
        attn_layer_period=4,
        attn_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        mamba_proj_bias=True,
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        **SMALL | {"num_hidden_layers": 4},
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_window_size=9,
        logits_soft_cap=20.0,
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **TINY, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    ),
    "lfm2 with biases, its width as it is": lambda: transformers.Lfm2Config(
        **TINY | {"num_hidden_layers": 2},
        full_attn_idxs=[1],
        conv_bias=True,
        block_auto_adjust_ff_dim=False,
    ),
    "rwkv": lambda: transformers.RwkvConfig(
        **SMALL | {"num_hidden_layers": 3}, attention_hidden_size=48, intermediate_size=40
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_these_families_are_those_of_transformers(name, tmp_path):
    hold(CASES[name](), tmp_path)


def test_an_activation_that_the_mixer_lacks_is_refused_by_name(tmp_path):
    build(transformers.MambaConfig(**MAMBA, hidden_act="gelu"), tmp_path / "gelu")
    with pytest.raises(ModelError, match="hidden_act='gelu'"):
        seqlab.load(tmp_path / "gelu")


def test_block_types_that_are_not_known_are_refused_by_name(tmp_path):
    gemma = CASES["recurrent_gemma"]()
    build(gemma, tmp_path / "gemma")
    config = tmp_path / "gemma" / "config.json"
    fields = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(fields | {"block_types": ["recurrent", "memory"]}), "utf-8")
    with pytest.raises(ModelError, match="memory"):
        seqlab.load(tmp_path / "gemma")
