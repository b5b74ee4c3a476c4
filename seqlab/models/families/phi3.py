"""Phi-3, Phi-3.5 and Phi-4: Llama whose maps of queries, keys and values are one, as are those of
its perceptron's gate and what it multiplies."""

from typing import Any

from seqlab.layers import norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, rule, split

MODEL_TYPES = ("phi3",)

#: What files need not say.
DEFAULTS = {
    "num_attention_heads": 32,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fields = fields.over(DEFAULTS)
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-5))
    window = fields.get("sliding_window")
    if window is not None and window >= fields["max_position_embeddings"]:
        window = None  # no text is longer, and its slots would be in memory
    kv_heads = fields.get("num_key_value_heads", fields["num_attention_heads"])
    mixer = llama.mixer(fields, kv_heads=kv_heads, window=window)
    layer = block.Config(mixer, llama.mlp(fields), join=block.Join(norm=norms))
    return decoder.config(fields, tensors, lambda _: layer, norm=norms)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, lambda b: [*llama.NORMS, *_layer(b, config.d_model)])


def _layer(b: Any, d_model: int) -> list[Rule]:
    a, inner = b.mixer, b.ffn.inner(d_model)
    size = a.head_dim or d_model // a.heads
    qkv = split(*(n * size for n in (a.heads, a.kv_heads, a.kv_heads)))
    gate_up = "ffn.gate.weight", "ffn.up.weight"
    return [
        rule([f"mixer.{n}.weight" for n in "qkv"], "self_attn.qkv_proj.weight", qkv, TRANSPOSE),
        rule(gate_up, "mlp.gate_up_proj.weight", split(inner, inner), TRANSPOSE),
        *linear("mixer.out", "self_attn.o_proj"),
        *linear("ffn.down", "mlp.down_proj"),
    ]
