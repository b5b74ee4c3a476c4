"""OLMo Hybrid: gated delta rules, and every few layers attention whose outputs are normed."""

from typing import Any

from seqlab.layers import norm
from seqlab.layers.mixers import gated_delta_net
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, join, linear, reshape, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("olmo_hybrid",)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["rms_norm_eps"])
    recurrent = block.Config(
        mixer=_mixer(fields), ffn=llama.mlp(fields), join=block.Join(norm=norms)
    )
    bias = fields.get("attention_bias", False)
    turns = fields["rope_parameters"].get("rope_theta") is not None
    attention = block.Config(
        mixer=llama.mixer(
            fields,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norms,
            qk_norm_over="width",
            **({} if turns else {"rope_base": None, "rope_scaling": None}),
        ),
        ffn=llama.mlp(fields),
        join=block.Join(norm=norms, place="after"),
    )
    kinds = {"linear_attention": recurrent, "full_attention": attention}
    layer = lambda n: kinds[fields["layer_types"][n]]
    return decoder.config(fields, tensors, layer, norm=norms)


def _mixer(fields: Fields) -> gated_delta_net.Config:
    heads = fields["num_attention_heads"]
    key_heads = fields.get("linear_num_key_heads", heads)
    key_dim = fields.get("linear_key_head_dim", int(0.75 * fields["hidden_size"] / key_heads))
    return gated_delta_net.Config(
        key_heads=key_heads,
        value_heads=fields.get("linear_num_value_heads", heads),
        key_dim=key_dim,
        value_dim=fields.get("linear_value_head_dim", 2 * key_dim),
        conv_width=fields.get("linear_conv_kernel_dim", 4),
        negative_eigenvalues=fields.get("linear_allow_neg_eigval", True),
        norm_eps=1e-5,  # whatever rms_norm_eps is
    )


def respelled(tensors: decoder.Tensors) -> dict[str, Any]:
    """transformers saves the norm behind attention as if it were that before the perceptron of a
    recurrent layer."""

    def published(name: str) -> str:
        layer, found, part = name.partition("feedforward_layer_norm")
        attends = f"{layer}self_attn.q_proj.weight" in tensors
        return f"{layer}post_attention_layernorm{part}" if found and attends else name

    return {published(name): tensor for name, tensor in tensors.items()}


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _layer)


def _layer(block: block.Config) -> list[Rule]:
    c = block.mixer
    if not isinstance(c, gated_delta_net.Config):
        return [
            *norm_rules("mixer_norm", "post_attention_layernorm"),
            *norm_rules("ffn_norm", "post_feedforward_layernorm"),
            *llama.ATTENTION,
            *llama.MLP,
        ]
    widths = (c.key_heads * c.key_dim,) * 2 + (c.value_heads * c.value_dim,)
    return [
        *norm_rules("mixer_norm", "attention_layer_norm"),
        *norm_rules("ffn_norm", "feedforward_layer_norm"),
        *qkv_rules("linear_attn", widths, c.conv_width),
        *linear("mixer.beta", "linear_attn.b_proj"),
        *linear("mixer.dt", "linear_attn.a_proj"),
        rule("mixer.A_log", "linear_attn.A_log"),
        rule("mixer.dt_bias", "linear_attn.dt_bias"),
        *linear("mixer.gate", "linear_attn.g_proj"),
        *norm_rules("mixer.norm", "linear_attn.o_norm"),
        *linear("mixer.out", "linear_attn.o_proj"),
        *llama.MLP,
    ]


def qkv_rules(theirs: str, widths: tuple[int, ...], conv_width: int) -> list[Rule]:
    """Queries, keys and values of these widths, and their convolution: one weight of ours, three
    tensors of theirs."""
    three = lambda name: [f"{theirs}.{a}_{name}.weight" for a in "qkv"]
    squeezed = reshape((-1, 1, conv_width), (-1, conv_width))
    side_by_side = (TRANSPOSE, join(*widths, axis=1))
    return [
        rule("mixer.qkv.weight", three("proj"), *side_by_side),
        rule("mixer.conv.weight", three("conv1d"), squeezed, *side_by_side),
    ]
