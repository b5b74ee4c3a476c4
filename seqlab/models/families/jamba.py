"""Jamba: layers of Mamba, some of attention without positions; every other has experts."""

from typing import Any

from seqlab.layers import ffn, moe, norm
from seqlab.layers.mixers import mamba as mixers
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama, mamba
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, rule, stack
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("jamba",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-6))
    mamba.only_silu(fields)

    def layer(n: int) -> block.Config:
        attends = n % fields["attn_layer_period"] == fields["attn_layer_offset"]
        expert = n % fields["expert_layer_period"] == fields["expert_layer_offset"]
        return block.Config(
            mixer=llama.mixer(fields, rope_base=None) if attends else _mixer(fields, norms.eps),
            ffn=_experts(fields) if expert and fields["num_experts"] > 1 else llama.mlp(fields),
            join=block.Join(norm=norms),
        )

    return decoder.config(fields, tensors, layer, norm=norms)


def rules(config: lm.Config) -> list[Rule]:
    layer = lambda b: [*NORMS, *_mixer_rules(b.mixer, config.d_model), *_ffn_rules(b.ffn)]
    return decoder.rules(config, layer, final="model.final_layernorm")


def _mixer(fields: Fields, eps: float) -> mixers.Config:
    return mixers.Config(
        d_state=fields["mamba_d_state"],
        expand=fields["mamba_expand"],
        conv_width=fields["mamba_d_conv"],
        conv_bias=fields.get("mamba_conv_bias", True),
        bias=fields.get("mamba_proj_bias", False),
        dt_rank=mamba.rank(fields, "mamba_dt_rank"),
        norm="weighted",
        norm_eps=eps,
    )


def _experts(fields: Fields) -> moe.Config:
    return moe.Config(
        experts=fields["num_experts"],
        top_k=fields["num_experts_per_tok"],
        width=fields["intermediate_size"],
        normalize=False,
    )


def _mixer_rules(c: Any, d_model: int) -> list[Rule]:
    if not isinstance(c, mixers.Config):
        return llama.ATTENTION
    normed = ("dt_layernorm", "b_layernorm", "c_layernorm")
    return [
        *mamba.mixer_rules(c, d_model, "mixer", "mamba"),
        *(r for i, n in enumerate(normed) for r in norm_rules(f"mixer.norms.{i}", f"mamba.{n}")),
    ]


def _ffn_rules(c: Any) -> list[Rule]:
    parts, theirs = ("gate", "up", "down"), "feed_forward"
    if isinstance(c, ffn.Config):
        return [r for n in parts for r in linear(f"ffn.{n}", f"{theirs}.{n}_proj")]
    of_all = lambda n: [f"{theirs}.experts.{e}.{n}_proj.weight" for e in range(c.experts)]
    return [
        *linear("ffn.router", f"{theirs}.router"),
        *(rule(f"ffn.{n}", of_all(n), TRANSPOSE, stack(c.experts)) for n in parts),
    ]


NORMS = [
    *norm_rules("mixer_norm", "input_layernorm"),
    *norm_rules("ffn_norm", "pre_ff_layernorm"),
]
