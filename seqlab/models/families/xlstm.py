"""xLSTM-7B (NX-AI), in both of its layouts: weights apart, or those of one input joined."""

import json
from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import ffn, norm
from seqlab.layers.mixers import mlstm
from seqlab.models import block, decoder, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, rule, split
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("xlstm",)
EMBED, HEAD = "backbone.embeddings.weight", "lm_head.weight"
TIED = (EMBED, HEAD)
LAYER, NORM = "backbone.blocks.{}.", "backbone.out_norm"


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    if fields.get("use_bias", False):
        raise ModelError("use_bias of config.json is true, and no xLSTM with biases is known here.")
    norms = norm.Config(eps=fields.get("norm_eps", 1e-6))
    fields.setdefault("num_hidden_layers", fields.get("num_blocks", 32))
    multiple = fields.get("ffn_round_up_to_multiple_of", 64)
    layer = block.Config(
        mixer=mlstm.Config(
            heads=fields["num_heads"],
            expand_k=fields.get("qk_dim_factor", 0.5),
            expand_v=fields.get("v_dim_factor", 1.0),
            gate_cap=fields.get("gate_soft_cap", 15.0),
            norm_eps=norms.eps,
            eps=fields.get("eps", 1e-6),
            layers=fields["num_hidden_layers"],
        ),
        ffn=ffn.Config(ratio=fields.get("ffn_proj_factor", 2.667), multiple_of=multiple),
        join=block.Join(norm=norms),
    )
    return decoder.config(
        fields,
        tensors,
        lambda _: layer,
        embed=EMBED,
        head=HEAD,
        layer=LAYER,
        norm=norms,
        logit_cap=fields.get("output_logit_soft_cap", 30.0),
    )


def rules(config: lm.Config) -> list[Rule]:
    published = json.loads(config.published or "{}")
    inputs = _joined if published.get("weight_mode") == "fused" else _apart
    layers = lambda block: [*COMMON, *inputs(block, config.d_model)]
    return decoder.rules(config, layers, embed=EMBED, head=HEAD, layer=LAYER, final=NORM)


COMMON = [
    *norm_rules("mixer_norm", "norm_mlstm"),
    *norm_rules("ffn_norm", "norm_ffn"),
    *norm_rules("mixer.norm", "mlstm_layer.multihead_norm"),
    *linear("mixer.out", "mlstm_layer.out_proj"),
    *linear("ffn.down", "ffn.proj_down"),
]


def _apart(block: Any, d_model: int) -> list[Rule]:
    return [
        *(linear(f"mixer.{name}", f"mlstm_layer.{name}")[0] for name in "qkv"),
        *linear("mixer.gate", "mlstm_layer.ogate_preact"),
        *linear("mixer.i", "mlstm_layer.igate_preact"),
        *linear("mixer.f", "mlstm_layer.fgate_preact"),
        *linear("ffn.gate", "ffn.proj_up_gate"),
        *linear("ffn.up", "ffn.proj_up"),
    ]


def _joined(block: Any, d_model: int) -> list[Rule]:
    c, inner = block.mixer, block.ffn.inner(d_model)
    d_k, d_v = int(d_model * c.expand_k), int(d_model * c.expand_v)
    weights = lambda part, *names: [f"{part}.{name}.weight" for name in names]
    return [
        rule(
            weights("mixer", "q", "k", "v", "gate"),
            "mlstm_layer.qkv_opreact.weight",
            TRANSPOSE,
            split(d_k, d_k, d_v, d_v, axis=1),
        ),
        rule(
            weights("mixer", "i", "f"),
            "mlstm_layer.ifgate_preact.weight",
            TRANSPOSE,
            split(c.heads, c.heads, axis=1),
        ),
        rule(
            ("mixer.i.bias", "mixer.f.bias"),
            "mlstm_layer.ifgate_preact.bias",
            split(c.heads, c.heads),
        ),
        rule(
            weights("ffn", "gate", "up"),
            "ffn.proj_up_gate_z.weight",
            TRANSPOSE,
            split(inner, inner, axis=1),
        ),
    ]
