"""A mixer of the registry in the sizes of the attention whose place it takes."""

import dataclasses
from typing import Any

from seqlab.layers import registry
from seqlab.layers.registry import MixerConfig

#: What a mixer that has positions or biases as attention has them takes over as it is.
ALIKE = (
    *("rope_base", "rope_fraction", "rope_scaling", "qk_norm", "qk_norm_over"),
    *("qkv_bias", "out_bias", "scale", "cap", "max_length"),
)


def fit(name: str, attention: Any, d_model: int) -> MixerConfig:
    """The Config of the mixer `name` with heads as many and as wide as those of an attention, whose
    sizes are written out. A mixer's file takes part by calling its sizes what others call them.

    Raises ConfigError for an unknown name, or where the mixer's sizes cannot be those.
    """
    config = registry.mixer_config(name)
    if type(config) is type(attention):
        return attention
    types = {field.name: field.type for field in dataclasses.fields(config)}
    same = {f.name for f in dataclasses.fields(attention) if types.get(f.name) == f.type}
    fitted = {field: getattr(attention, field) for field in ALIKE if field in same}
    fitted |= {field: n for field, n in _sizes(attention, d_model).items() if field in types}
    if "groups" not in types:
        fitted.pop("d_state", None)  # all heads see the same keys, which cannot be those of each
    return dataclasses.replace(config, **fitted)


def _sizes(attention: Any, d_model: int) -> dict[str, Any]:
    """By the names that mixers give them. Where heads are in groups with keys and queries of their
    own, each has its own, as wide as its state (Wang et al., 2024)."""
    H, G, K = attention.heads, attention.kv_heads, attention.head_dim
    biased = {"bias": True} if attention.qkv_bias else {}
    return {
        **dict.fromkeys(("heads", "key_heads", "value_heads", "groups"), H),
        **dict.fromkeys(("head_dim", "key_dim", "value_dim", "d_state"), K),
        **dict.fromkeys(("expand_k", "expand_v"), _ratio(H * K, d_model)),
        **{"kv_heads": G, "width": H * K},
        **biased,
    }


def _ratio(width: int, d_model: int) -> float:
    """What int(d_model * ratio) makes into the width again, whichever way products are rounded."""
    return (width + 0.25) / d_model if int(d_model * (width / d_model)) < width else width / d_model
