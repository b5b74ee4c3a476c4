"""Hybrids of delta rules compute what transformers computes, and are exported to the bit."""

import pytest
import transformers

from tests.hf_models import TINY, hold, rank_differently

KIMI = TINY | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "pad_token_id": 0,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}

QWEN = TINY | {
    "num_hidden_layers": 4,
    "head_dim": 16,
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

CASES = {
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**QWEN, **EXPERTS, mlp_only_layers=[1]),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**QWEN),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(
        **{name: size for name, size in QWEN.items() if name != "intermediate_size"}, **EXPERTS
    ),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(
        **TINY | {"num_hidden_layers": 4},
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=8,  # transformers saves q, k and v cut in three equal parts
        pad_token_id=0,
    ),
    "kimi_linear": lambda: transformers.KimiLinearConfig(**KIMI),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hybrid_is_that_of_transformers(name, tmp_path):
    hold(CASES[name](), tmp_path, adjust=rank_differently)
