"""Qwen3-Next and Qwen3.5: layers of a gated delta rule, every fourth of gated attention."""

from typing import Any

from seqlab.layers import ffn, moe, norm
from seqlab.layers.mixers import attention
from seqlab.layers.mixers import gated_delta_net as mixers
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import (
    TRANSPOSE,
    Rule,
    Step,
    conv,
    first,
    join,
    linear,
    reshape,
    rule,
    split,
    stack,
)
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
IGNORED = (r"mtp\..*", r"model\.visual\..*")  # predicts several tokens ahead; sees pictures


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["rms_norm_eps"], offset=True)
    bias = fields.get("attention_bias", False)
    attends = llama.mixer(fields, gate=True, qk_norm=norms, qkv_bias=bias, out_bias=bias)
    recurrent = mixer(fields, norm_eps=norms.eps)
    layer = lambda n: block.Config(
        mixer=attends if fields["layer_types"][n] == "full_attention" else recurrent,
        ffn=_experts(fields) if _sparse(fields, n) else llama.mlp(fields),
        join=block.Join(norm=norms),
    )
    return decoder.config(fields, tensors, layer, norm=norms)


def mixer(fields: Fields, **more: Any) -> mixers.Config:
    """The gated delta rule that the usual fields describe; `more` adds to them."""
    return mixers.Config(
        key_heads=fields["linear_num_key_heads"],
        value_heads=fields["linear_num_value_heads"],
        key_dim=fields["linear_key_head_dim"],
        value_dim=fields["linear_value_head_dim"],
        conv_width=fields["linear_conv_kernel_dim"],
        **more,
    )


def _sparse(fields: Fields, n: int) -> bool:
    """Whether the channel mixer of layer n is a mixture of experts."""
    every = fields.get("decoder_sparse_step", 1)
    alone = n in fields.get("mlp_only_layers", ())
    return fields.get("num_experts", 0) > 0 and not alone and (n + 1) % every == 0


def _experts(fields: Fields) -> moe.Config:
    act = llama.activation(fields)
    return moe.Config(
        experts=fields["num_experts"],
        top_k=fields["num_experts_per_tok"],
        width=fields["moe_intermediate_size"],
        activation=act,
        normalize=fields.get("norm_topk_prob", True),
        shared=ffn.Config(width=fields["shared_expert_intermediate_size"], activation=act),
        shared_gate=True,
    )


def rules(config: lm.Config) -> list[Rule]:
    fused = '"qwen3_next"' in (config.published or '"qwen3_next"')
    return decoder.rules(config, lambda block: _layer(block, config.d_model, fused))


def _layer(block: Any, d_model: int, fused: bool) -> list[Rule]:
    channels = _expert_rules(block.ffn) if isinstance(block.ffn, moe.Config) else llama.MLP
    if isinstance(block.mixer, attention.Config):
        return [*llama.NORMS, *_attention(block.mixer, d_model), *channels]
    projections = _by_key_head(block.mixer, d_model) if fused else FLAT
    return [*llama.NORMS, *projections, *_recurrent(block.mixer), *channels]


def _attention(c: attention.Config, d_model: int) -> list[Rule]:
    """Queries and their gates lie side by side in each head."""
    each = 2 * c.heads * (c.head_dim or d_model // c.heads)
    apart = [split(each // 2 // c.heads, each // 2 // c.heads, axis=1)]
    gated = lambda part, inner: [
        rule(
            (f"mixer.q.{part}", f"mixer.gate.{part}"),
            f"self_attn.q_proj.{part}",
            reshape((each, *inner), (c.heads, each // c.heads, *inner)),
            *apart,
            reshape((c.heads, each // 2 // c.heads, *inner), (each // 2, *inner)),
            *((TRANSPOSE,) if inner else ()),
        )
    ]
    return [
        *gated("weight", (d_model,)),
        *gated("bias", ()),
        *(one for one in llama.ATTENTION if not one.ours[0].startswith("mixer.q.")),
    ]


def _by_key_head(c: mixers.Config, d_model: int) -> list[Rule]:
    """Rows lie by key head: q, k, and the v and gates of its value heads; then beta and dt."""
    G, R = c.key_heads, c.value_heads // c.key_heads
    qkvz = c.key_dim, c.key_dim, R * c.value_dim, R * c.value_dim
    d_k, d_v = G * c.key_dim, c.value_heads * c.value_dim

    def apart(*sizes: int) -> tuple[Step, ...]:
        by_head = reshape((-1, d_model), (G, sum(sizes), d_model))
        return by_head, split(*sizes, axis=1), reshape((G, -1, d_model), (-1, d_model)), TRANSPOSE

    return [
        rule(
            ("mixer.qkv.weight", "mixer.gate.weight"),
            "linear_attn.in_proj_qkvz.weight",
            *apart(*qkvz),
            first(3, join(d_k, d_k, d_v, axis=1)),
        ),
        rule(
            ("mixer.beta.weight", "mixer.dt.weight"),
            "linear_attn.in_proj_ba.weight",
            *apart(R, R),
        ),
    ]


def _recurrent(c: mixers.Config) -> list[Rule]:
    return [
        *conv("mixer.conv", "linear_attn.conv1d", c.conv_width),
        rule("mixer.A_log", "linear_attn.A_log"),
        rule("mixer.dt_bias", "linear_attn.dt_bias"),
        *norm_rules("mixer.norm", "linear_attn.norm"),
        *linear("mixer.out", "linear_attn.out_proj"),
    ]


def _expert_rules(c: moe.Config) -> list[Rule]:
    each = lambda name: [f"mlp.experts.{e}.{name}_proj.weight" for e in range(c.experts)]
    parts = ("gate", "up", "down")
    shared = [linear(f"ffn.shared.{a}", f"mlp.shared_expert.{a}_proj") for a in parts]
    return [
        *linear("ffn.router", "mlp.gate"),
        *(rule(f"ffn.{a}", each(a), TRANSPOSE, stack(c.experts)) for a in parts),
        *(one for rules in shared for one in rules),
        *linear("ffn.shared_gate", "mlp.shared_expert_gate"),
    ]


FLAT = [
    *linear("mixer.qkv", "linear_attn.in_proj_qkv"),
    *linear("mixer.gate", "linear_attn.in_proj_z"),
    *linear("mixer.beta", "linear_attn.in_proj_b"),
    *linear("mixer.dt", "linear_attn.in_proj_a"),
]
