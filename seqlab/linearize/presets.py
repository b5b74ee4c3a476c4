"""Published linearizations, as the mixers that take the place of a teacher's softmax attention.

Each takes the teacher's config and gives one whose projections are the teacher's; further fields
are set over those of the paper, such as window=32. A teacher says its head_dim: where it is None, a
feature map is as wide as in the papers, whose heads have 64 channels or more.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from seqlab.layers import attention_heads, feature_maps, feature_memory
from seqlab.layers.mixers import attention, hybrid_attention

Preset = Callable[..., Any]  # (teacher: attention.Config, **fields) -> a mixer's config
Memory = feature_memory.Config


def swa(teacher: attention.Config, **fields: Any) -> attention.Config:
    """The teacher, of which each token sees the last 64. Nothing is trained."""
    return dataclasses.replace(teacher, **{"window": 64, "sinks": 0} | fields)


def swa_sink(teacher: attention.Config, **fields: Any) -> attention.Config:
    """The same with as many keys, 4 of which are the first (Xiao et al., 2023, StreamingLLM)."""
    return dataclasses.replace(teacher, **{"window": 60, "sinks": 4} | fields)


def liger(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """Liger (Lan et al., 2025), as gated linear attention: gates are keys, half of the answer is
    the window's."""
    memory = Memory(decay_power=1 / 16, chunk_size=64)
    return _hybrid(teacher, {"memory": memory} | fields)


def liger_hgrn2(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """Liger as HGRN2: what is written is what the gate forgets."""
    memory = Memory(write="forgotten", chunk_size=64)
    return _hybrid(teacher, {"memory": memory} | fields)


def liger_gsa(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """Liger as gated slot attention: as many slots as a head has channels."""
    plain = feature_maps.Config("identity")
    memory = Memory(plain, decay_power=1 / 16, write="slots", chunk_size=64)
    return _hybrid(teacher, {"memory": memory} | fields)


def liger_mamba2(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """Liger as Mamba-2, of which the paper gives the gate alone: one a head, of its mean key."""
    memory = Memory(decay_form="softplus", decay_width=1, chunk_size=64)
    return _hybrid(teacher, {"memory": memory} | fields)


def lizard(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """Lizard (Nguyen et al., 2025): a gate for each token, four learned scores beside the window's,
    and no positions. What the paper leaves open is as in LoLCATs, but gates start at 0.9975, not
    0.5: a memory that forgets sooner than the window ends has nothing to learn from."""
    memory = Memory(_hedgehog(teacher), decay="token", decay_bias=6.0, norm="own", chunk_size=64)
    ours = {"window": 128, "window_rope": False, "sink_logits": 4, "mix": "alpha", "memory": memory}
    return _hybrid(teacher, ours | fields)


def lizard_rope(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """Lizard, but queries and keys in the window turn with their positions, as the teacher's do."""
    return lizard(teacher, **{"window_rope": True} | fields)


def hedgehog(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """Hedgehog (Zhang et al., 2024): learned features and no window."""
    memory = Memory(_hedgehog(teacher), rope="before", decay="none", norm="own", chunk_size=64)
    return _hybrid(teacher, {"window": None, "memory": memory} | fields)


def lolcats(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """LoLCATs (Zhang et al., 2024), in its form "sw": softmax in a sliding window, Hedgehog behind
    it, one divisor for both."""
    return hedgehog(teacher, **{"window": 64, "overlap": False, "mix": "joint"} | fields)


def t2r(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """T2R (Kasai et al., 2021): relu(x W + b) of each head, without a window."""
    plain = feature_maps.Config("t2r", per_head=True)
    memory = Memory(plain, rope="before", decay="none", norm="own", chunk_size=64)
    return _hybrid(teacher, {"window": None, "memory": memory} | fields)


def supra(teacher: attention.Config, **fields: Any) -> hybrid_attention.Config:
    """SUPRA (Mercat et al., 2024): relu(x W + b) of all heads at once, rotated afterwards, fixed
    decays, and a norm of each head in the place of a divisor."""
    memory = Memory(
        feature_maps.Config("t2r"),
        map_over="width",
        tie_feature_map=teacher.kv_heads in (None, teacher.heads),
        rope="after",
        scale=True,
        decay="fixed",
        norm="groupnorm",
        eps=1e-5,
        chunk_size=64,
    )
    return _hybrid(teacher, {"window": None, "memory": memory} | fields)


def _hybrid(teacher: attention.Config, fields: dict[str, Any]) -> hybrid_attention.Config:
    """With the teacher's projections, and a window of 64 tokens unless the fields say otherwise."""
    names = (field.name for field in dataclasses.fields(attention_heads.Config))
    taught: dict[str, Any] = {"window": 64} | {name: getattr(teacher, name) for name in names}
    return hybrid_attention.Config(**taught | fields)


def _hedgehog(teacher: attention.Config) -> feature_maps.Config:
    """A map for each head to 2 * 64 features, or 2 a channel of narrower heads."""
    width = min(teacher.head_dim or 64, 64)
    return feature_maps.Config("hedgehog", width=width, per_head=True, bias=False, joint=False)


METHODS = (
    *(liger, liger_hgrn2, liger_gsa, liger_mamba2, lizard, lizard_rope, lolcats),
    *(hedgehog, t2r, supra, swa, swa_sink),
)
#: By the name of the method.
PRESETS: dict[str, Preset] = {method.__name__: method for method in METHODS}
