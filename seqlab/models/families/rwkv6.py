"""RWKV-6 as fla-hub publishes it."""

from typing import Any

from seqlab.layers import norm
from seqlab.layers.mixers import rwkv6, rwkv6_channel_mix
from seqlab.models import block, decoder, fla, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, reshape, rule, transpose
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("rwkv6",)
TIED = fla.TIED


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fla.check(fields, hidden_act="sqrelu")
    norms = norm.Config(
        kind="layer", eps=fields.get("norm_eps", 1e-5), bias=fields.get("norm_bias", True)
    )
    rows = lambda name: fla.width(tensors, decoder.LAYER.format(0) + name)
    layer = block.Config(
        mixer=rwkv6.Config(
            heads=fields["num_heads"],
            expand_k=fields.get("expand_k", 0.5),
            expand_v=fields.get("expand_v", 1.0),
            mix_rank=rows("attn.x_proj.0.linear.weight") // 5,
            decay_rank=rows("attn.w_proj.linear.lora.0.weight"),
            norm_eps=norms.eps,
        ),
        ffn=rwkv6_channel_mix.Config(width=rows("ffn.key.linear.weight")),
        join=block.Join(norm=norms),
    )
    return decoder.config(
        fields,
        tensors,
        lambda _: layer,
        embed=fla.EMBED,
        norm=norms,
        embed_norm=norms if fields.get("norm_first", True) else None,
    )


def rules(config: lm.Config) -> list[Rule]:
    return [
        *decoder.rules(config, lambda block: _rules(block.mixer), embed=fla.EMBED),
        *norm_rules("embed_norm", "model.layers.0.pre_norm"),
    ]


def _rules(mixer: Any) -> list[Rule]:
    # [D, 5 rank] <-> [5, rank, D]
    up = reshape((-1, 5 * mixer.mix_rank), (-1, 5, mixer.mix_rank)), transpose(1, 2, 0)
    return [*COMMON, rule("mixer.mix_up", "attn.x_proj.2.weight", *up)]


COMMON = [
    *norm_rules("mixer_norm", "attn_norm"),
    *norm_rules("ffn_norm", "ffn_norm"),
    rule("mixer.mu", "attn.x_proj.0.mu"),
    *linear("mixer.mix_down", "attn.x_proj.0.linear"),
    rule("mixer.mix_bias", "attn.x_bias"),
    *linear("mixer.r", "attn.r_proj.linear"),
    *linear("mixer.k", "attn.k_proj.linear"),
    *linear("mixer.v", "attn.v_proj.linear"),
    *linear("mixer.gate", "attn.g_proj.linear"),
    *linear("mixer.decay_down", "attn.w_proj.linear.lora.0"),
    rule("mixer.decay_up", "attn.w_proj.linear.lora.2.weight", TRANSPOSE),
    rule("mixer.decay_bias", "attn.w_proj.linear.lora.2.bias"),
    rule("mixer.bonus", "attn.bonus"),
    *norm_rules("mixer.norm", "attn.g_norm"),
    *linear("mixer.out", "attn.o_proj"),
    rule("ffn.mu_k", "ffn.key.mu"),
    rule("ffn.mu_r", "ffn.receptance.mu"),
    *linear("ffn.key", "ffn.key.linear"),
    *linear("ffn.value", "ffn.value"),
    *linear("ffn.receptance", "ffn.receptance.linear"),
]
