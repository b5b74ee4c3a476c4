"""Kimi Linear: Kimi Delta Attention, latent attention without positions, experts."""

import re
from typing import Any

from seqlab.layers import moe, norm
from seqlab.layers.mixers import kda
from seqlab.models import block, decoder, lm
from seqlab.models.families import deepseek_v3, llama
from seqlab.models.families.olmo_hybrid import qkv_rules
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, linear, reshape, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("kimi_linear",)

#: Names of the first files -> those of today.
OLDER = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    longest = fields.max_length
    fields = Fields({OLDER.get(name, name): value for name, value in fields.items()})
    fields.max_length = longest
    norms = norm.Config(eps=fields["rms_norm_eps"])
    kinds = {
        "linear_attention": _mixer(fields),
        "full_attention": deepseek_v3.mixer(fields, rope_base=None),
    }
    n = decoder.depth(fields, tensors)
    layers, sparse = _layers(fields, n), _sparse(fields, n)
    layer = lambda n: block.Config(
        mixer=kinds[layers[n]],
        ffn=deepseek_v3.experts(fields) if sparse[n] else llama.mlp(fields),
        join=block.Join(norm=norms),
    )
    return decoder.config(fields, tensors, layer, norm=norms)


def _mixer(fields: Fields) -> kda.Config:
    nested = fields.get("linear_attn_config", {})
    head_dim = nested.get("head_dim") or fields["linear_head_dim"]
    return kda.Config(
        heads=nested.get("num_heads") or fields["linear_num_heads"],
        key_dim=head_dim,
        value_dim=head_dim,
        rank=head_dim,
        conv_width=nested.get("short_conv_kernel_size") or fields.get("linear_conv_kernel_dim", 4),
        norm_eps=fields["rms_norm_eps"],
    )


def _layers(fields: Fields, n: int) -> list[str]:
    nested = fields.get("linear_attn_config", {})
    if "layer_types" in fields:
        return fields["layer_types"]
    full = set(nested.get("full_attn_layers", range(5, n + 1, 4)))  # counted from 1
    return ["full_attention" if i + 1 in full else "linear_attention" for i in range(n)]


def _sparse(fields: Fields, n: int) -> list[bool]:
    dense = fields.get("first_k_dense_replace", 1)
    kinds = fields.get("mlp_layer_types", ["dense"] * dense + ["sparse"] * (n - dense))
    return [kind == "sparse" for kind in kinds]


def respelled(tensors: decoder.Tensors) -> dict[str, Any]:
    """transformers saves the perceptron of a layer without experts as if it had some."""
    dense = re.compile(r"(.*)\.block_sparse_moe\.((?:gate|up|down)_proj\..*)")
    return {dense.sub(r"\1.mlp.\2", name): tensor for name, tensor in tensors.items()}


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _layer)


def _layer(block: Any) -> list[Rule]:
    c = block.mixer
    recurrent = isinstance(c, kda.Config)
    mixer = _mixer_rules(c) if recurrent else deepseek_v3.mixer_rules(c, "self_attn")
    if not isinstance(block.ffn, moe.Config):
        return [*llama.NORMS, *mixer, *llama.MLP]
    experts = deepseek_v3.expert_rules(block.ffn, "block_sparse_moe", EXPERT)
    return [*llama.NORMS, *mixer, *experts]


def _mixer_rules(c: kda.Config) -> list[Rule]:
    widths = (c.heads * c.key_dim,) * 2 + (c.heads * c.value_dim,)
    return [
        *qkv_rules("self_attn", widths, c.conv_width),
        *linear("mixer.beta", "self_attn.b_proj"),
        *linear("mixer.decay_down", "self_attn.f_a_proj"),
        *linear("mixer.decay_up", "self_attn.f_b_proj"),
        rule("mixer.A_log", "self_attn.A_log", reshape((1, 1, -1, 1), (-1,))),
        rule("mixer.dt_bias", "self_attn.dt_bias"),
        *linear("mixer.gate_down", "self_attn.g_a_proj"),
        *linear("mixer.gate_up", "self_attn.g_b_proj"),
        *norm_rules("mixer.norm", "self_attn.o_norm"),
        *linear("mixer.out", "self_attn.o_proj"),
    ]
