"""RecurrentGemma (Griffin): layers of the RG-LRU, some of local attention."""

from typing import Any

import jax.numpy as jnp

from seqlab.errors import ModelError
from seqlab.layers import ffn, norm
from seqlab.layers.mixers import attention, rg_lru
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, conv, linear, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("recurrent_gemma",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-6), offset=True)
    activation = llama.activation(fields, "hidden_activation")
    # intermediate_size counts both halves of the gated perceptron
    mlp = ffn.Config(width=fields["intermediate_size"] // 2, activation=activation, bias=True)
    types = fields.get("block_types", ("recurrent", "recurrent", "attention"))
    if activation != "gelu_tanh" or not set(types) <= {"recurrent", "attention"}:
        raise ModelError(
            f"hidden_activation={fields.get('hidden_activation')!r} with block_types={types!r}: "
            "this family is read with gelu_pytorch_tanh, and with recurrent and attention blocks."
        )
    kinds = {"recurrent": _recurrent, "attention": _attention}
    layer = lambda n: block.Config(
        mixer=kinds[types[n % len(types)]](fields), ffn=mlp, join=block.Join(norm=norms)
    )
    d_model = fields["hidden_size"]
    return decoder.config(
        fields,
        tensors,
        layer,
        norm=norms,
        embed_scale=float(jnp.bfloat16(d_model**0.5)),  # theirs is rounded so in any dtype
        logit_cap=fields.get("logits_soft_cap", 30.0),
    )


def rules(config: lm.Config) -> list[Rule]:
    layer = lambda b: [*COMMON, *_mixer_rules(b.mixer)]
    return decoder.rules(config, layer, final="model.final_norm")


def _recurrent(fields: Fields) -> rg_lru.Config:
    return rg_lru.Config(
        width=fields.get("lru_width"),
        heads=fields["num_attention_heads"],
        conv_width=fields.get("conv1d_width", 4),
    )


def _attention(fields: Fields) -> attention.Config:
    turning = fields["rope_parameters"].get("partial_rotary_factor", 0.5)
    return llama.mixer(
        fields,
        window=fields.get("attention_window_size", 2048),
        rope_fraction=turning,
        qkv_bias=fields.get("attention_bias", False),
        out_bias=True,
    )


def _mixer_rules(c: Any) -> list[Rule]:
    theirs = "temporal_block"
    if isinstance(c, attention.Config):
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
        return _linears("mixer", theirs, names)
    inside = {
        "decay": "recurrent_param",
        "input": "input_gate_weight",
        "input_bias": "input_gate_bias",
        "recurrent": "recurrent_gate_weight",
        "recurrent_bias": "recurrent_gate_bias",
    }
    return [
        *_linears("mixer", theirs, {"gate": "linear_y", "u": "linear_x", "out": "linear_out"}),
        *conv("mixer.conv", f"{theirs}.conv_1d", c.conv_width),
        *(rule(f"mixer.{a}", f"{theirs}.rg_lru.{b}") for a, b in inside.items()),
    ]


def _linears(ours: str, theirs: str, names: dict[str, str]) -> list[Rule]:
    return [r for a, b in names.items() for r in linear(f"{ours}.{a}", f"{theirs}.{b}")]


COMMON = [
    *norm_rules("mixer_norm", "temporal_pre_norm"),
    *norm_rules("ffn_norm", "channel_pre_norm"),
    *_linears("ffn", "mlp_block", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
]
