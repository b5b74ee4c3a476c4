"""DeepSeek-V3 and what is built like it (Moonlight): latent attention, and experts in groups."""

import math
from collections.abc import Mapping
from typing import Any

from seqlab.layers import moe, norm
from seqlab.layers.mixers import mla
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, rule, stack
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("deepseek_v3",)

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["rms_norm_eps"])
    rope = fields.rope()
    turning = {name: rope[name] for name in ("rope_base", "rope_scaling")}
    attention = mixer(
        fields, **turning, interleaved=fields.get("rope_interleave", True), scale=_scale(fields)
    )
    layer = lambda n: block.Config(
        mixer=attention,
        ffn=experts(fields) if n >= fields["first_k_dense_replace"] else llama.mlp(fields),
        join=block.Join(norm=norms),
    )
    return decoder.config(fields, tensors, layer, norm=norms)


def mixer(fields: Fields, **more: Any) -> mla.Config:
    """The latent attention that the usual fields describe; `more` adds to them."""
    return mla.Config(
        heads=fields["num_attention_heads"],
        kv_rank=fields["kv_lora_rank"],
        q_rank=fields.get("q_lora_rank"),
        nope_dim=fields["qk_nope_head_dim"],
        rope_dim=fields["qk_rope_head_dim"],
        v_dim=fields["v_head_dim"],
        bias=fields.get("attention_bias", False),
        max_length=fields.longest,
        **more,
    )


def _scale(fields: Fields) -> float | None:
    """Of the scores: YaRN sharpens them here, where others lengthen queries and keys."""
    rope = fields["rope_parameters"]
    factor, m = rope.get("factor") or 1.0, rope.get("mscale_all_dim")
    if factor <= 1 or not m:
        return None
    sharper = 0.1 * m * math.log(factor) + 1
    return (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]) ** -0.5 * sharper**2


def experts(fields: Fields) -> moe.Config:
    """The mixture that the usual fields describe."""
    width, act = fields["moe_intermediate_size"], llama.activation(fields)
    return moe.Config(
        experts=fields["n_routed_experts"],
        top_k=fields["num_experts_per_tok"],
        width=width,
        activation=act,
        score="sigmoid",
        normalize=fields.get("norm_topk_prob", True),
        scale=fields.get("routed_scaling_factor", 1.0),
        correction=True,
        groups=fields.get("n_group", 1),
        top_groups=fields.get("topk_group", 1),
        shared=llama.mlp(fields, width=width * fields.get("n_shared_experts", 1)),
    )


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _layer)


def _layer(block: Any) -> list[Rule]:
    attention = [*llama.NORMS, *mixer_rules(block.mixer, "self_attn")]
    if not isinstance(block.ffn, moe.Config):
        return [*attention, *llama.MLP]
    return [*attention, *expert_rules(block.ffn, "mlp", PROJECTIONS)]


def mixer_rules(c: mla.Config, theirs: str) -> list[Rule]:
    return [
        *linear("mixer.q_down", f"{theirs}.q_a_proj"),
        *norm_rules("mixer.q_norm", f"{theirs}.q_a_layernorm"),
        *linear("mixer.q", f"{theirs}.q_b_proj" if c.q_rank else f"{theirs}.q_proj"),
        *linear("mixer.kv_down", f"{theirs}.kv_a_proj_with_mqa"),
        *norm_rules("mixer.kv_norm", f"{theirs}.kv_a_layernorm"),
        *linear("mixer.kv", f"{theirs}.kv_b_proj"),
        *linear("mixer.out", f"{theirs}.o_proj"),
    ]


def expert_rules(c: moe.Config, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    """One tensor an expert, called by `names` of gate, up and down."""
    each = lambda name: [f"{theirs}.experts.{e}.{name}.weight" for e in range(c.experts)]
    shared = [linear(f"ffn.shared.{a}", f"{theirs}.shared_experts.{a}_proj") for a in names]
    return [
        *linear("ffn.router", f"{theirs}.gate"),
        rule("ffn.correction", f"{theirs}.gate.e_score_correction_bias"),
        *(rule(f"ffn.{a}", each(b), TRANSPOSE, stack(c.experts)) for a, b in names.items()),
        *(one for rules in shared for one in rules),
    ]
