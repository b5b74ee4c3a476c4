"""Llama and its kin compute what transformers computes, and are exported to the bit."""

import numpy as np
import pytest
import torch
import transformers

import seqlab
from seqlab.conformance.tolerance import assert_same_logits
from tests.hf_models import TINY, B, T, build, hold, logits, torch_logits

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

CASES = {
    "llama": lambda: transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3),
    "llama with biases, tied, one layer": lambda: transformers.LlamaConfig(
        **TINY | {"num_hidden_layers": 1, "num_key_value_heads": None},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=LINEAR,
    ),
    "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=7, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(
        **TINY,
        tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
    "qwen3 with a window from layer 1 on": lambda: transformers.Qwen3Config(
        **TINY, head_dim=12, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_and_its_kin_are_those_of_transformers(name, tmp_path):
    model = hold(CASES[name](), tmp_path)
    assert len(model.before) + len(model.blocks) + len(model.after) <= 2


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("mistral", {"window": 7, "kv_heads": 2, "head_dim": 16}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": {}, "head_dim": 12, "rope_base": 1e6}),
    ],
)
def test_a_model_of_ours_that_is_built_like_one_of_these_is_exported_as_it(kind, fields, tmp_path):
    mixer = seqlab.mixer_config("attention", max_length=64, **fields)
    config = seqlab.LMConfig(vocab=97, d_model=32, pattern=(mixer,), repeats=2)
    model = seqlab.build(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        seqlab.export_hf(model, tmp_path / kind), attn_implementation="eager", dtype=torch.float32
    )
    assert theirs.config.model_type == kind
    tokens = np.random.default_rng(0).integers(0, 97, (B, T), np.int32)
    assert_same_logits(logits(model, tokens), torch_logits(theirs.eval(), tokens))


def test_a_bfloat16_file_keeps_its_values(tmp_path):
    """Vectors come back as float32 of the same values, which transformers rounds to themselves."""
    build(CASES["llama"](), tmp_path / "wide")
    read = transformers.AutoModelForCausalLM.from_pretrained
    read(tmp_path / "wide", dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    seqlab.export_hf(seqlab.load(tmp_path / "theirs"), tmp_path / "exported")
    tokens = np.random.default_rng(0).integers(0, 97, (B, T), np.int32)
    one, two = (read(tmp_path / name).eval() for name in ("theirs", "exported"))
    assert one.dtype == two.dtype == torch.bfloat16
    assert (torch_logits(one, tokens) == torch_logits(two, tokens)).all()
