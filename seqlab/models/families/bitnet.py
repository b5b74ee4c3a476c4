"""BitNet b1.58 2B4T (Ma et al., 2025): Llama with ternary weights, squared ReLUs and more norms.

Files hold latent weights, which transformers rounds as it runs, or packed ones, four to a byte.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from seqlab.errors import ModelError
from seqlab.kernels.ternary_matmul import packing
from seqlab.layers import bit_linear, linear_kinds, norm, ternary_linear
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, each, reshape, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("bitnet",)
QUANTIZED = ("bitnet",)

#: What linear maps are by their quantization_mode, where this is said of the rest.
MODES = {"online": bit_linear.Config, "offline": ternary_linear.Config}
METHOD = {"quant_method": "bitnet", "linear_class": "autobitlinear"}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-5))
    bias, act = fields.get("attention_bias", False), {"hidden_act": "relu2"} | fields
    rope = {"rope_theta": fields["rope_parameters"].get("rope_theta") or 500_000.0}
    read = Fields(act | {"rope_parameters": fields["rope_parameters"] | rope})
    read.max_length = fields.max_length
    mixer = llama.mixer(read, qkv_bias=bias, out_bias=bias, out_norm=norms)
    d, kv_heads = read["hidden_size"], mixer.kv_heads or mixer.heads
    if linear_kinds.NARROW * kv_heads * (mixer.head_dim or d // mixer.heads) <= d:
        raise ModelError(
            f"config.json has {kv_heads} heads of keys, so narrow that they would not be rounded "
            "here: take a bitnet with more."
        )
    layer = block.Config(mixer=mixer, ffn=llama.mlp(read, norm=norms), join=block.Join(norm=norms))
    linear = _linear(fields.get("quantization_config"))
    return decoder.config(fields, tensors, lambda _: layer, norm=norms, linear=linear)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, lambda _: LAYER)


def describe(config: lm.Config) -> tuple[dict[str, Any], lm.Config] | None:
    """config.json of a model that may be one of these, and its config written out."""
    described, linear = llama.describe(config), config.linear
    modes = [mode for mode, kind in MODES.items() if type(linear) is kind]
    if described is None or not modes:
        return None
    quantized = METHOD | {"quantization_mode": modes[0]}
    quantized |= {"use_rms_norm": linear.norm, "rms_norm_eps": linear.eps}
    fields, same = described
    return fields | {"model_type": "bitnet", "quantization_config": quantized}, same


def _linear(quantized: dict[str, Any] | None) -> Any:
    """The kind of linear maps; without a quantization_config transformers rounds nothing."""
    if quantized is None:
        return linear_kinds.Dense()
    mode, found = quantized.get("quantization_mode"), {n: quantized.get(n) for n in METHOD}
    if mode not in MODES or found != METHOD:
        raise ModelError(
            f"config.json has quantization_mode={mode!r} and {found}, and a bitnet is read only "
            f"with one of {', '.join(MODES)} and {METHOD}: take the files that its authors publish."
        )
    return MODES[mode](
        norm=quantized.get("use_rms_norm", False),
        eps=quantized.get("rms_norm_eps", 1e-6),
        head=False,
    )


def _repacked(packed: np.ndarray) -> np.ndarray:
    """[out / 4, in], whose row r has rows r, r + out / 4, ... in pairs of bits -> as we pack it"""
    if not packing.is_packed(jnp.asarray(packed)):
        raise ModelError("A packed weight holds what is no trit: restore the file from a copy.")
    trits = np.concatenate([packed >> shift & 3 for shift in range(0, 8, 2)]).astype(np.int8) - 1
    return np.asarray(packing.pack(jnp.asarray(trits.T)))


def _as_theirs(packed: np.ndarray) -> np.ndarray:
    inputs = packing.PER_BYTE * len(packed)
    codes = np.asarray(packing.unpack(jnp.asarray(packed), inputs)).T.astype(np.uint8) + 1
    a, b, c, d = codes.reshape(packing.PER_BYTE, -1, inputs)
    return a | b << 2 | c << 4 | d << 6


def _map(ours: str, theirs: str) -> list[Rule]:
    """What a linear map has besides latent weights: those that are packed, a norm of its own."""
    return [
        rule(f"{ours}.codes", f"{theirs}.weight", each(_repacked, _as_theirs)),
        rule(f"{ours}.scale", f"{theirs}.weight_scale", reshape((1,), ())),
        rule(f"{ours}.norm.weight", f"{theirs}.rms_norm.weight"),
    ]


LAYER = [
    *llama.NORMS,
    *llama.ATTENTION,
    *llama.MLP,
    *norm_rules("mixer.out_norm", "self_attn.attn_sub_norm"),
    *norm_rules("ffn.norm", "mlp.ffn_sub_norm"),
    *_map("mixer.q", "self_attn.q_proj"),
    *_map("mixer.k", "self_attn.k_proj"),
    *_map("mixer.v", "self_attn.v_proj"),
    *_map("mixer.out", "self_attn.o_proj"),
    *_map("ffn.gate", "mlp.gate_proj"),
    *_map("ffn.up", "mlp.up_proj"),
    *_map("ffn.down", "mlp.down_proj"),
]
