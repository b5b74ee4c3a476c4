"""Falcon-H1: Mamba-2 and attention side by side in every layer, with multipliers of muP."""

from seqlab.layers import norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama, mamba2
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("falcon_h1",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["rms_norm_eps"])
    gain = lambda name: float(fields.get(f"{name}_multiplier", 1.0))
    bias = fields.get("attention_bias", False)
    head_dim = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    attention = llama.mixer(
        fields,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        scale=gain("key") * head_dim**-0.5,
    )
    gate_gain, down_gain = fields.get("mlp_multipliers", (1.0, 1.0))
    layer = block.Config(
        mixer=_recurrent(fields, norms.eps),
        gain=(gain("ssm_in"), gain("ssm_out")),
        beside=attention,
        beside_gain=(gain("attention_in"), gain("attention_out")),
        ffn=llama.mlp(
            fields, bias=fields.get("mlp_bias", False), gate_gain=gate_gain, gain=down_gain
        ),
        join=block.Join(norm=norms),
    )
    return decoder.config(
        fields,
        tensors,
        lambda _: layer,
        norm=norms,
        embed_scale=gain("embedding"),
        logit_scale=gain("lm_head"),
    )


def _recurrent(fields: Fields, eps: float) -> mamba2.mamba2.Config:
    inner = fields.get("mamba_d_ssm", fields.get("mamba_expand", 2) * fields["hidden_size"])
    order = "before_gate" if fields.get("mamba_norm_before_gate", True) else "after_gate"
    return mamba2.mixer(
        fields,
        mamba2.HYBRID,
        eps,
        act=llama.activation(fields),
        head_dim=int(inner) // fields["mamba_n_heads"],
        out_bias=fields.get("projectors_bias", False),
        norm=order if fields.get("mamba_rms_norm", False) else None,
        gains=tuple(fields.get("ssm_multipliers", (1.0,) * 5)),
    )


def rules(config: lm.Config) -> list[Rule]:
    layers = lambda block: [
        *norm_rules("mixer_norm", "input_layernorm"),
        *mamba2.mixer_rules(block.mixer, "mixer", "mamba"),
        *mamba2.attention_rules("beside", "self_attn"),
        *norm_rules("ffn_norm", "pre_ff_layernorm"),
        *mamba2.mlp_rules("ffn", "feed_forward"),
    ]
    return decoder.rules(config, layers, final="model.final_layernorm")
