"""xLSTM and MiniMax compute what transformers computes, and are exported to the bit."""

import pytest
import transformers

from tests.hf_models import TINY, hold

XLSTM = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "chunk_size": 16,
    "ffn_round_up_to_multiple_of": 16,
    "autocast_kernel_dtype": "float32",
}
MINIMAX = TINY | {
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "block_size": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_attn_alpha_factor": 0.8,
    "linear_attn_beta_factor": 1.3,
    "mlp_alpha_factor": 0.9,
}


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_xlstm_is_that_of_transformers(weight_mode, tmp_path, monkeypatch):
    # transformers 5.23 cannot initialise "fused" (its shapes disagree); the weights are ours anyway
    monkeypatch.setattr(transformers.xLSTMPreTrainedModel, "_init_weights", lambda self, m: None)
    model = hold(transformers.xLSTMConfig(**XLSTM, weight_mode=weight_mode), tmp_path)
    assert len(model.blocks) == 1, "its layers are alike, so one program serves all"


def test_minimax_is_that_of_transformers(tmp_path):
    hold(transformers.MiniMaxConfig(**MINIMAX), tmp_path, buffers=r"_decay$|slope_rate$")
