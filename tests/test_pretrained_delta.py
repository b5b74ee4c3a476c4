"""Families of the delta rule are what transformers computes, to the bit when they are exported."""

import pytest
import transformers

from tests.hf_models import TINY, hold, rank_differently

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
FOUR = TINY | {"num_hidden_layers": 4} | LINEAR

CASES = {
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **FOUR, **EXPERTS, head_dim=16, mlp_only_layers=[1]
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**FOUR, head_dim=16),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(**FOUR, pad_token_id=0, eos_token_id=1),
}


@pytest.mark.parametrize("name", CASES)
def test_these_families_are_those_of_transformers(name, tmp_path):
    hold(CASES[name](), tmp_path)


def test_kimi_linear_is_that_of_transformers(tmp_path):
    config = transformers.KimiLinearConfig(
        **TINY | {"num_hidden_layers": 5, "num_key_value_heads": 4},
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        linear_head_dim=8,
        linear_num_heads=3,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    hold(config, tmp_path, rank_differently)
