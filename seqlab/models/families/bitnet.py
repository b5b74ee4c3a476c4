"""BitNet b1.58 2B4T (Ma et al., 2025): Llama with ternary weights, squared ReLUs and more norms.

These are its latent weights, which transformers rounds as it runs.
"""

from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import bit_linear, linear_kinds, norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("bitnet",)
QUANTIZED = ("bitnet",)

ONLINE = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-5))
    bias, act = fields.get("attention_bias", False), {"hidden_act": "relu2"} | fields
    rope = {"rope_theta": fields["rope_parameters"].get("rope_theta") or 500_000.0}
    read = Fields(act | {"rope_parameters": fields["rope_parameters"] | rope})
    read.max_length = fields.max_length
    layer = block.Config(
        mixer=llama.mixer(read, qkv_bias=bias, out_bias=bias, out_norm=norms),
        ffn=llama.mlp(read, norm=norms),
        join=block.Join(norm=norms),
    )
    linear = _linear(fields.get("quantization_config"))
    return decoder.config(fields, tensors, lambda _: layer, norm=norms, linear=linear)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, lambda _: LAYER)


def describe(config: lm.Config) -> tuple[dict[str, Any], lm.Config] | None:
    """config.json of a model that may be one of these, and its config written out."""
    described, linear = llama.describe(config), config.linear
    if described is None or not isinstance(linear, bit_linear.Config):
        return None
    normed = {"use_rms_norm": linear.norm, "rms_norm_eps": linear.eps}
    fields, same = described
    return fields | {"model_type": "bitnet", "quantization_config": ONLINE | normed}, same


def _linear(quantized: dict[str, Any] | None) -> Any:
    """The kind of linear maps; without a quantization_config transformers rounds nothing."""
    if quantized is None:
        return linear_kinds.Dense()
    found = {name: quantized.get(name) for name in ONLINE}
    if found != ONLINE:
        raise ModelError(
            f"config.json has the quantization_config {found}, and a bitnet is read only with "
            f"{ONLINE}: take its bf16 weights."
        )
    return bit_linear.Config(
        norm=quantized.get("use_rms_norm", False),
        eps=quantized.get("rms_norm_eps", 1e-6),
        head=False,
    )


def _norm(ours: str, theirs: str) -> Rule:
    """Of a linear map that has one of its own."""
    return rule(f"{ours}.norm.weight", f"{theirs}.rms_norm.weight")


LAYER = [
    *llama.NORMS,
    *llama.ATTENTION,
    *llama.MLP,
    *norm_rules("mixer.out_norm", "self_attn.attn_sub_norm"),
    *norm_rules("ffn.norm", "mlp.ffn_sub_norm"),
    *(_norm(f"mixer.{n}", f"self_attn.{n}_proj") for n in "qkv"),
    _norm("mixer.out", "self_attn.o_proj"),
    *(_norm(f"ffn.{n}", f"mlp.{n}_proj") for n in ("gate", "up", "down")),
]
