"""Granite 4: layers of Mamba-2, some of attention, with a perceptron or a mixture of experts."""

from typing import Any

from seqlab.layers import ffn, moe, norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama, mamba2
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, rule, split, transpose
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("granitemoehybrid",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["rms_norm_eps"])
    bias = fields.get("attention_bias", False)
    rotates = fields.get("position_embedding_type") == "rope"
    attention = llama.mixer(
        fields,
        qkv_bias=bias,
        out_bias=bias,
        scale=float(fields["attention_multiplier"]),
        **fields.rope() if rotates else {"rope_base": None},
    )
    recurrent = mamba2.mixer(fields, mamba2.HYBRID, norms.eps, act=llama.activation(fields))
    kinds = fields["layer_types"]
    layer = lambda n: block.Config(
        mixer=attention if mamba2.is_attention(kinds[n]) else recurrent,
        ffn=_ffn(fields),
        join=block.Join(norm=norms, scale=float(fields.get("residual_multiplier", 1.0))),
    )
    return decoder.config(
        fields,
        tensors,
        layer,
        norm=norms,
        embed_scale=float(fields.get("embedding_multiplier", 1.0)),
        logit_scale=1 / float(fields.get("logits_scaling", 1.0)),
    )


def _ffn(fields: Fields) -> ffn.Config | moe.Config:
    shared = llama.mlp(fields, width=fields["shared_intermediate_size"])
    if not fields.get("num_local_experts"):
        return shared
    return moe.Config(
        experts=fields["num_local_experts"],
        top_k=fields["num_experts_per_tok"],
        width=fields["intermediate_size"],
        activation=shared.activation,
        shared=shared,
    )


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _layer)


def _layer(block: block.Config) -> list[Rule]:
    if isinstance(block.mixer, mamba2.mamba2.Config):
        mixer = mamba2.mixer_rules(block.mixer, "mixer", "mamba")
    else:
        mixer = mamba2.attention_rules("mixer", "self_attn")
    return [
        *norm_rules("mixer_norm", "input_layernorm"),
        *mixer,
        *norm_rules("ffn_norm", "post_attention_layernorm"),
        *_ffn_rules(block.ffn),
    ]


def _ffn_rules(c: Any) -> list[Rule]:
    """Gate and up are one matrix, of the shared perceptron and of each expert."""
    if isinstance(c, ffn.Config):
        return _shared_rules(c, "ffn")
    theirs, halves = "block_sparse_moe", split(c.width, c.width, axis=2)
    swapped = transpose(0, 2, 1)
    return [
        *linear("ffn.router", f"{theirs}.router.layer"),
        rule(("ffn.gate", "ffn.up"), f"{theirs}.input_linear.weight", swapped, halves),
        rule("ffn.down", f"{theirs}.output_linear.weight", swapped),
        *_shared_rules(c.shared, "ffn.shared"),
    ]


def _shared_rules(c: ffn.Config, ours: str) -> list[Rule]:
    assert c.width is not None
    names = (f"{ours}.gate.weight", f"{ours}.up.weight")
    return [
        rule(names, "shared_mlp.input_linear.weight", split(c.width, c.width), TRANSPOSE),
        *linear(f"{ours}.down", "shared_mlp.output_linear"),
    ]
