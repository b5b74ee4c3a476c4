"""DeepSeek-V3 computes what transformers computes, and is exported to the bit."""

import pytest
import transformers

from tests.hf_models import TINY, hold, rank_differently

SIZES = TINY | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

CASES = {
    "stretched, with two shared experts": lambda: transformers.DeepseekV3Config(
        **SIZES, q_lora_rank=12, n_shared_experts=2, rope_parameters=YARN
    ),
    "queries in one map, weights not normalised": lambda: transformers.DeepseekV3Config(
        **SIZES, q_lora_rank=None, rope_interleave=False, norm_topk_prob=False
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_deepseek_v3_is_that_of_transformers(name, tmp_path):
    hold(CASES[name](), tmp_path, adjust=rank_differently)
