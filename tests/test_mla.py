"""Latent attention is that of DeepSeek-V3 and Kimi Linear, however its tokens arrive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from seqlab.conformance.tolerance import assert_close
from seqlab.layers.mixers import mla
from seqlab.models.parameters import bind

D, B, T = 24, 2, 11
SIZES = {
    "hidden_size": D,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "attn_implementation": "eager",
}
OURS = {"heads": 3, "kv_rank": 10, "nope_dim": 6, "rope_dim": 4, "v_dim": 5, "max_length": 16}
NAMES = {
    "q_proj": "q",
    "q_a_proj": "q_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv",
    "o_proj": "out",
}


def kimi():
    from transformers.models.kimi_linear import modeling_kimi_linear as t

    config = t.KimiLinearConfig(**SIZES, layer_types=["full_attention"], num_hidden_layers=1)
    config._attn_implementation = "eager"
    attention = t.KimiLinearAttention(config, 0)
    run = lambda x, mask: attention(x, attention_mask=mask)[0]
    return attention, run, mla.Config(**OURS, rope_base=None)


def deepseek(interleaved=False):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as t

    config = t.DeepseekV3Config(
        **SIZES, q_lora_rank=8, attention_bias=True, rope_interleave=interleaved, rope_theta=1e4
    )
    config._attn_implementation = "eager"
    attention, turn = t.DeepseekV3Attention(config, 0), t.DeepseekV3RotaryEmbedding(config)

    def run(x, mask):
        angles = turn(x, torch.arange(T)[None])
        return attention(x, position_embeddings=angles, attention_mask=mask)[0]

    return attention, run, mla.Config(**OURS, q_rank=8, bias=True, interleaved=interleaved)


def deepseek_as_published():
    return deepseek(interleaved=True)


def translated(tensors):
    """Transposed, nothing else."""
    named = {NAMES[name.split(".")[0]] + "." + name.split(".")[1]: a for name, a in tensors.items()}
    return {name: jnp.asarray(a.numpy().T) for name, a in named.items()}


@pytest.mark.parametrize("family", [kimi, deepseek, deepseek_as_published])
def test_latent_attention_equals_transformers(family):
    """All tokens at once, and one by one, which reads the latent vectors themselves."""
    torch.manual_seed(0)
    attention, run, config = family()
    attention = attention.double().eval()
    x = torch.randn(B, T, D, dtype=torch.float64)
    mask = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        for tensor in attention.state_dict().values():
            tensor.normal_(0, 0.6)
        expected = run(x, mask).numpy()
    with jax.enable_x64(True):
        model = bind(config.build(D, rngs=nnx.Rngs(0)), translated(attention.state_dict()))
        call, x = jax.jit(lambda m, x, s: m(x, s)), jnp.asarray(x.numpy())
        empty = jax.tree.map(
            lambda a: a.astype(np.float64) if a.dtype == jnp.float32 else a, model.init_state(B)
        )
        whole, _ = call(model, x, empty)
        steps, state = [], empty
        for t in range(T):
            y, state = call(model, x[:, t : t + 1], state)
            steps.append(y)
        one_by_one = jnp.concatenate(steps, 1)
    # cosines and sines, and softmax, are float32 there
    assert_close(whole.astype(jnp.float32), expected)
    assert_close(one_by_one, whole)


def test_the_state_keeps_no_keys_of_heads():
    sizes = lambda heads: sum(
        a.size
        for a in jax.tree.leaves(mla.Config(heads=heads).build(D, rngs=nnx.Rngs(0)).init_state(1))
    )
    assert sizes(2) == sizes(16) == 256 * (16 + 4) + 1
