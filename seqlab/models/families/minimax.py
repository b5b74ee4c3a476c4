"""MiniMax-Text-01: fixed decays that depend on the layer, full attention every few, experts."""

from typing import Any

from seqlab.layers import moe, norm
from seqlab.layers.mixers import attention, lightning
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, rule, stack
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("minimax",)
#: Tables of decays, which follow from the number of the layer.
IGNORED = (r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    depth = decoder.depth(fields, tensors)
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-5))
    kinds = fields.get("layer_types") or [
        "linear_attention" if n % 2 else "full_attention" for n in range(depth)
    ]
    experts = moe.Config(
        experts=fields["num_local_experts"],
        top_k=fields["num_experts_per_tok"],
        width=fields["intermediate_size"],
        activation=llama.activation(fields),
    )

    def layer(n: int) -> block.Config:
        linear = kinds[n] == "linear_attention"
        return block.Config(
            mixer=_linear(fields, n, depth) if linear else _full(fields),
            ffn=experts,
            join=_join(fields, norms, "linear_attn" if linear else "full_attn"),
            ffn_join=_join(fields, norms, "mlp"),
        )

    return decoder.config(fields, tensors, layer, norm=norms)


def _linear(fields: Fields, n: int, depth: int) -> lightning.Config:
    return lightning.Config(
        heads=fields["num_attention_heads"],
        head_dim=fields.get("head_dim"),
        layer=n,
        layers=depth,
        activation=llama.activation(fields),
    )


def _full(fields: Fields) -> attention.Config:
    return llama.mixer(fields, window=fields.get("sliding_window"))


def _join(fields: Fields, norms: norm.Config, part: str) -> block.Join:
    keep, scale = (fields.get(f"{part}_{factor}_factor", 1.0) for factor in ("alpha", "beta"))
    return block.Join(norm=norms, on_normed=True, keep=keep, scale=scale)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _rules)


def _rules(block: Any) -> list[Rule]:
    mixer = LINEAR if isinstance(block.mixer, lightning.Config) else llama.ATTENTION
    theirs = lambda name: [
        f"block_sparse_moe.experts.{e}.{name}.weight" for e in range(block.ffn.experts)
    ]
    each = lambda ours, name: rule(ours, theirs(name), TRANSPOSE, stack(block.ffn.experts))
    return [
        *llama.NORMS,
        *mixer,
        *linear("ffn.router", "block_sparse_moe.gate"),
        each("ffn.gate", "w1"),
        each("ffn.down", "w2"),
        each("ffn.up", "w3"),
    ]


LINEAR = [
    *linear("mixer.qkv", "self_attn.qkv_proj"),
    *linear("mixer.gate", "self_attn.output_gate"),
    *linear("mixer.out", "self_attn.out_proj"),
    *norm_rules("mixer.norm", "self_attn.norm"),
]
