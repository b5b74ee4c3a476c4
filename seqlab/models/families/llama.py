"""Llama (1 to 3.x) and what is built like it: Mistral, Qwen2 and Qwen3."""

import dataclasses
from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import ffn, norm
from seqlab.layers.mixers import attention
from seqlab.models import block, decoder, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, linear
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

#: Their names of activations -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-6))
    join = block.Join(norm=norms)
    layer = lambda n: block.Config(
        mixer=mixer(
            fields,
            window=_window(fields, n),
            qkv_bias=fields.get("attention_bias", fields["model_type"] == "qwen2"),
            out_bias=fields.get("attention_bias", False),
            qk_norm=norms if fields["model_type"] == "qwen3" else None,
        ),
        ffn=mlp(fields, bias=fields.get("mlp_bias", False)),
        join=join,
    )
    return decoder.config(fields, tensors, layer, norm=norms)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, lambda _: [*NORMS, *ATTENTION, *MLP])


def describe(config: lm.Config) -> tuple[dict[str, Any], lm.Config] | None:
    """config.json of a model that may be one of these (whether it is, its reader finds out), and
    the model's config with every size written out."""
    one = config.block(config.pattern[0])
    if not isinstance(one.mixer, attention.Config) or not isinstance(one.ffn, ffn.Config):
        return None
    a, d = one.mixer, config.d_model
    described = {
        "model_type": _kind(a),
        "vocab_size": config.vocab,
        "hidden_size": d,
        "intermediate_size": one.ffn.inner(d),
        "num_hidden_layers": len(decoder.places(config)),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads or a.heads,
        "head_dim": a.head_dim or d // a.heads,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[one.ffn.activation],
        "max_position_embeddings": a.max_length,
        "rms_norm_eps": config.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_base},
        "sliding_window": a.window,
        "attention_bias": a.qkv_bias if a.out_bias == a.qkv_bias else None,
        "mlp_bias": one.ffn.bias,
        "tie_word_embeddings": config.tie_embeddings,
    }
    fields = {name: value for name, value in described.items() if value is not None}
    written = tuple(_written_out(block, d) for _, _, block in decoder.places(config))
    same = dataclasses.replace(config, before=(), pattern=written, repeats=1, after=())
    return fields, same


def _written_out(one: block.Config, d_model: int) -> block.Config:
    mixer, mlp = one.mixer, one.ffn
    if isinstance(mixer, attention.Config):
        heads = {"kv_heads": mixer.kv_heads or mixer.heads}
        heads["head_dim"] = mixer.head_dim or d_model // mixer.heads
        mixer = dataclasses.replace(mixer, **heads)
    mlp = mlp.written_out(d_model) if isinstance(mlp, ffn.Config) else mlp
    return dataclasses.replace(one, mixer=mixer, ffn=mlp)


def _kind(a: attention.Config) -> str:
    if a.qk_norm is not None:
        return "qwen3"
    if a.window is not None:
        return "mistral"
    return "qwen2" if a.qkv_bias and not a.out_bias else "llama"


def mixer(fields: Fields, **more: Any) -> attention.Config:
    """The attention that the usual fields describe; `more` adds to them."""
    described = {
        "heads": fields["num_attention_heads"],
        "kv_heads": fields.get("num_key_value_heads"),
        "head_dim": fields.get("head_dim"),
        "max_length": fields.longest,
        **fields.rope(),
    }
    return attention.Config(**described | more)


def mlp(fields: Fields, **more: Any) -> ffn.Config:
    """The gated perceptron that the usual fields describe; `more` adds to them."""
    described = {"width": fields["intermediate_size"], "activation": activation(fields)}
    return ffn.Config(**described | more)


def activation(fields: Fields, name: str = "hidden_act", usual: str = "silu") -> Any:
    """Our name of an activation, which is the usual one where the file does not say; raises
    ModelError where there is none."""
    theirs = fields.get(name, usual)
    if theirs not in ACTIVATIONS:
        raise ModelError(f"{name}={theirs!r} of config.json is no activation known here.")
    return ACTIVATIONS[theirs]


def _window(fields: Fields, n: int) -> int | None:
    """How many tokens layer n sees; None is all."""
    if fields["model_type"] == "llama":
        return None
    window = fields.get("sliding_window")
    if fields["model_type"] == "mistral":
        return window
    kinds = fields.get("layer_types")
    slides = n >= fields.get("max_window_layers", 28) if kinds is None else kinds[n][0] == "s"
    return window if fields.get("use_sliding_window", False) and slides else None


NORMS = [
    *norm_rules("mixer_norm", "input_layernorm"),
    *norm_rules("ffn_norm", "post_attention_layernorm"),
]
ATTENTION = [
    *linear("mixer.q", "self_attn.q_proj"),
    *linear("mixer.k", "self_attn.k_proj"),
    *linear("mixer.v", "self_attn.v_proj"),
    *linear("mixer.out", "self_attn.o_proj"),
    *norm_rules("mixer.q_norm", "self_attn.q_norm"),
    *norm_rules("mixer.k_norm", "self_attn.k_norm"),
]
MLP = [
    *linear("ffn.gate", "mlp.gate_proj"),
    *linear("ffn.up", "mlp.up_proj"),
    *linear("ffn.down", "mlp.down_proj"),
]
