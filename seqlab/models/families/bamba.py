"""Bamba: layers of Mamba-2, some of attention, each with a perceptron."""

from seqlab.layers import norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama, mamba2
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("bamba",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["rms_norm_eps"])
    bias = fields.get("attention_bias", False)
    half = {"partial_rotary_factor": 0.5}  # where config.json does not say
    stated = {k: v for k, v in fields["rope_parameters"].items() if v is not None}
    rope = Fields(fields | {"rope_parameters": half | stated}).rope()
    attention = llama.mixer(fields, qkv_bias=bias, out_bias=bias, **rope)
    recurrent = mamba2.mixer(fields, mamba2.HYBRID, norms.eps, act=llama.activation(fields))
    attends = fields.get("attn_layer_indices", ())
    layer = lambda n: block.Config(
        mixer=attention if n in attends else recurrent,
        ffn=llama.mlp(fields, bias=fields.get("mlp_bias", False)),
        join=block.Join(norm=norms),
    )
    return decoder.config(fields, tensors, layer, norm=norms)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _layer, final="model.final_layernorm")


def _layer(block: block.Config) -> list[Rule]:
    if isinstance(block.mixer, mamba2.mamba2.Config):
        mixer = mamba2.mixer_rules(block.mixer, "mixer", "mamba")
    else:
        mixer = mamba2.attention_rules("mixer", "self_attn")
    return [
        *norm_rules("mixer_norm", "input_layernorm"),
        *mixer,
        *norm_rules("ffn_norm", "pre_ff_layernorm"),
        *mamba2.mlp_rules("ffn", "feed_forward"),
    ]
