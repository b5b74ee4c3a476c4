"""Kimi Linear: layers of Kimi Delta Attention, some of latent attention without positions."""

from collections.abc import Sequence

from seqlab.layers import moe, norm
from seqlab.layers.mixers import kda, mla
from seqlab.models import block, decoder, lm
from seqlab.models.families import deepseek_v3, llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, join, linear, reshape, rule, transpose
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("kimi_linear",)

#: Fields by the names of the original files, and what transformers calls them in memory.
RENAMED = {
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_expert_group": "n_group",
    "moe_renormalize": "norm_topk_prob",
    "model_max_length": "max_position_embeddings",
}
#: The original files' names of what stands in files that transformers wrote under one prefix.
ALIASES = ((r"\.mlp\.", ".block_sparse_moe."),)
EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fields = _normalised(fields)
    norms = norm.Config(eps=fields["rms_norm_eps"])
    attends = deepseek_v3.mixer(fields, rope_base=None, norm_eps=1e-6)
    recurrent = kda.Config(
        heads=fields["linear_num_heads"],
        key_dim=fields["linear_head_dim"],
        value_dim=fields["linear_head_dim"],
        rank=fields["linear_head_dim"],
        conv_width=fields["linear_conv_kernel_dim"],
        norm_eps=norms.eps,
    )
    layer = lambda n: block.Config(
        mixer=attends if fields["layer_types"][n] == "full_attention" else recurrent,
        ffn=deepseek_v3.experts(fields) if _sparse(fields, n) else llama.mlp(fields),
        join=block.Join(norm=norms),
    )
    return decoder.config(fields, tensors, layer, norm=norms)


def _normalised(fields: Fields) -> Fields:
    """The original files' fields, by the names that transformers has for them."""
    renamed = {RENAMED.get(name, name): value for name, value in fields.items()}
    nested = fields.get("linear_attn_config") or {}
    names = {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    renamed |= {names[name]: value for name, value in nested.items() if name in names}
    if "layer_types" not in renamed and "full_attn_layers" in nested:
        full = nested["full_attn_layers"]  # counted from 1
        kinds = ("linear_attention", "full_attention")
        renamed["layer_types"] = [kinds[n + 1 in full] for n in range(fields["num_hidden_layers"])]
    normalised = Fields(renamed)
    normalised.max_length = fields.max_length
    return normalised


def _sparse(fields: Fields, n: int) -> bool:
    """Whether the channel mixer of layer n is a mixture of experts."""
    kinds = fields.get("mlp_layer_types")
    return n >= fields.get("first_k_dense_replace", 1) if kinds is None else kinds[n] == "sparse"


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _layer)


def _layer(block: block.Config) -> Sequence[Rule]:
    if isinstance(block.ffn, moe.Config):
        channels = deepseek_v3.expert_rules(block.ffn, "block_sparse_moe", EXPERTS)
    else:
        channels = DENSE
    if isinstance(block.mixer, mla.Config):
        mixer = deepseek_v3.mixer_rules(block.mixer, "self_attn")
    else:
        mixer = _recurrent(block.mixer)
    return [*llama.NORMS, *mixer, *channels]


def _recurrent(c: kda.Config) -> list[Rule]:
    side_by_side = join(*(c.heads * d for d in (c.key_dim, c.key_dim, c.value_dim)), axis=1)
    each = lambda what: [f"self_attn.{name}_{what}.weight" for name in "qkv"]
    taps = transpose(2, 1, 0), reshape((c.conv_width, 1, -1), (c.conv_width, -1))
    return [
        rule("mixer.qkv.weight", each("proj"), TRANSPOSE, side_by_side),
        rule("mixer.conv.weight", each("conv1d"), *taps, side_by_side),
        rule("mixer.A_log", "self_attn.A_log", reshape((1, 1, -1, 1), (-1,))),
        rule("mixer.dt_bias", "self_attn.dt_bias"),
        *linear("mixer.decay_down", "self_attn.f_a_proj"),
        *linear("mixer.decay_up", "self_attn.f_b_proj"),
        *linear("mixer.beta", "self_attn.b_proj"),
        *linear("mixer.gate_down", "self_attn.g_a_proj"),
        *linear("mixer.gate_up", "self_attn.g_b_proj"),
        *norm_rules("mixer.norm", "self_attn.o_norm"),
        *linear("mixer.out", "self_attn.o_proj"),
    ]


DENSE = [
    *linear("ffn.gate", "block_sparse_moe.gate_proj"),
    *linear("ffn.up", "block_sparse_moe.up_proj"),
    *linear("ffn.down", "block_sparse_moe.down_proj"),
]
