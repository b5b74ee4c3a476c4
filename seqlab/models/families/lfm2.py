"""LFM2: layers of gated short convolutions, some of attention."""

from typing import Any

from seqlab.layers import ffn, norm
from seqlab.layers.mixers import attention, gated_conv
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, conv, linear
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("lfm2",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("norm_eps", 1e-5))
    fields.setdefault("rope_theta", 1e6)
    short = gated_conv.Config(
        conv_width=fields.get("conv_L_cache", 3), bias=fields.get("conv_bias", False)
    )
    layer = lambda n: block.Config(
        mixer=llama.mixer(fields, qk_norm=norms) if _attends(fields, n) else short,
        ffn=ffn.Config(width=_width(fields)),
        join=block.Join(norm=norms),
    )
    return decoder.config(fields, tensors, layer, norm=norms)


def rules(config: lm.Config) -> list[Rule]:
    layer = lambda b: [*COMMON, *_mixer_rules(b.mixer)]
    return decoder.rules(config, layer, final="model.embedding_norm")


def _attends(fields: Fields, n: int) -> bool:
    kinds = fields.get("layer_types")
    if kinds is not None:
        return kinds[n] == "full_attention"
    return n in fields.get("full_attn_idxs", range(fields["num_hidden_layers"]))


def _width(fields: Fields) -> int:
    """Of the perceptron: what config.json says may be that of one without a gate."""
    width = fields.get("block_ff_dim", fields.get("intermediate_size", 12288))
    if fields.get("block_auto_adjust_ff_dim", True):
        width = int(fields.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        multiple = fields.get("block_multiple_of", 256)
        width = -(-width // multiple) * multiple
    return width


def _mixer_rules(c: Any) -> list[Rule]:
    if isinstance(c, attention.Config):
        return ATTENTION
    return [
        *conv("mixer.conv", "conv.conv", c.conv_width),
        *linear("mixer.inner", "conv.in_proj"),
        *linear("mixer.out", "conv.out_proj"),
    ]


COMMON = [
    *norm_rules("mixer_norm", "operator_norm"),
    *norm_rules("ffn_norm", "ffn_norm"),
    *linear("ffn.gate", "feed_forward.w1"),
    *linear("ffn.up", "feed_forward.w3"),
    *linear("ffn.down", "feed_forward.w2"),
]
ATTENTION = [
    *linear("mixer.q", "self_attn.q_proj"),
    *linear("mixer.k", "self_attn.k_proj"),
    *linear("mixer.v", "self_attn.v_proj"),
    *linear("mixer.out", "self_attn.out_proj"),
    *norm_rules("mixer.q_norm", "self_attn.q_layernorm"),
    *norm_rules("mixer.k_norm", "self_attn.k_layernorm"),
]
