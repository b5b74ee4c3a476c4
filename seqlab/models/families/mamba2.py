"""Mamba-2 (state-spaces, Codestral), and the parts of the hybrids that are built with it."""

import math
from collections.abc import Mapping
from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import norm
from seqlab.layers.mixers import mamba2
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, conv, linear, rule, split
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("mamba2",)

EMBED = "backbone.embeddings.weight"
TIED = (EMBED, decoder.HEAD)

#: Ours <- the name of a field, as mamba2 has it and as most hybrids do; and what biases are
#: where a config.json does not say.
BIASES = {"conv_bias": True, "bias": False}
PUBLISHED = {
    "heads": "num_heads",
    "head_dim": "head_dim",
    "d_state": "state_size",
    "groups": "n_groups",
    "conv_width": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
HYBRID = {
    "heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "d_state": "mamba_d_state",
    "groups": "mamba_n_groups",
    "conv_width": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "bias": "mamba_proj_bias",
}

#: The kinds of a hybrid's layers, in today's spelling and in older ones.
RECURRENT, ATTENTION = ("linear_attention", "mamba"), ("full_attention", "attention")


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["layer_norm_epsilon"])
    layer = block.Config(
        mixer=mixer(fields, PUBLISHED, norms.eps, act=llama.activation(fields)),
        join=block.Join(norm=norms),
    )
    return decoder.config(
        fields, tensors, lambda _: layer, embed=EMBED, layer="backbone.layers.{}.", norm=norms
    )


def rules(config: lm.Config) -> list[Rule]:
    layers = lambda block: [
        *norm_rules("mixer_norm", "norm"),
        *mixer_rules(block.mixer, "mixer", "mixer"),
    ]
    return decoder.rules(
        config, layers, embed=EMBED, layer="backbone.layers.{}.", final="backbone.norm_f"
    )


def mixer(
    fields: Fields, names: Mapping[str, str], eps: float, act: str = "silu", **more: Any
) -> mamba2.Config:
    """The mixer that the fields of these `names` describe; `more` adds to them."""
    if act != "silu":
        raise ModelError(f"The activation of Mamba-2 is {act!r}, and only silu is known here.")
    described: dict[str, Any] = {
        ours: fields.get(theirs, BIASES[ours]) if ours in BIASES else fields[theirs]
        for ours, theirs in names.items()
    }
    if described.get("head_dim") == "auto":
        inner = int(fields["mamba_expand"] * fields["hidden_size"])
        described["head_dim"] = inner // described["heads"]
    described |= {
        "out_bias": described["bias"],
        "norm_eps": eps,
        "dt_limit": _limit(fields.get("time_step_limit", (0.0, math.inf))),
    }
    return mamba2.Config(**described | more)


def _limit(stated: Any) -> tuple[float, float | None]:
    """dt's range; JSON has infinity as a number, or in the spelling of transformers 5."""
    low, high = (math.inf if isinstance(end, dict) else float(end) for end in stated)
    return low, high if math.isfinite(high) else None


def mixer_rules(c: mamba2.Config, ours: str, theirs: str) -> list[Rule]:
    """in_proj has the rows [z | x | B | C | dt], and the convolution the channels [x | B | C]."""
    assert c.heads is not None
    inner = c.heads * c.head_dim
    parts = split(inner, inner + 2 * c.groups * c.d_state, c.heads)
    projected = lambda part: tuple(f"{ours}.{name}.{part}" for name in ("z", "xbc", "dt"))
    return [
        rule(projected("weight"), f"{theirs}.in_proj.weight", parts, TRANSPOSE),
        rule(projected("bias"), f"{theirs}.in_proj.bias", parts),
        *conv(f"{ours}.conv", f"{theirs}.conv1d", c.conv_width),
        *(rule(f"{ours}.{name}", f"{theirs}.{name}") for name in ("A_log", "D", "dt_bias")),
        *norm_rules(f"{ours}.norm", f"{theirs}.norm"),
        *linear(f"{ours}.out", f"{theirs}.out_proj"),
    ]


def attention_rules(ours: str, theirs: str) -> list[Rule]:
    """Of the attention beside it in hybrids."""
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    return [r for a, b in names.items() for r in linear(f"{ours}.{a}", f"{theirs}.{b}")]


def mlp_rules(ours: str, theirs: str) -> list[Rule]:
    """Of the perceptron beside it in hybrids."""
    return [r for n in ("gate", "up", "down") for r in linear(f"{ours}.{n}", f"{theirs}.{n}_proj")]


def is_attention(kind: str) -> bool:
    """Whether a layer of this type is attention, not recurrent; raises ModelError for others."""
    if kind not in (*RECURRENT, *ATTENTION):
        raise ModelError(f"The layer type {kind!r} is not known here: mend layer_types.")
    return kind in ATTENTION
