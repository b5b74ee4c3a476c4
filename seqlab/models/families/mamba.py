"""Mamba, and FalconMamba, which norms what selects."""

from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import norm
from seqlab.layers.mixers import mamba
from seqlab.models import block, decoder, lm
from seqlab.models.families.llama import activation
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, conv, linear, rule, split
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("mamba", "falcon_mamba")

NAMES: dict[str, Any] = {
    "embed": "backbone.embeddings.weight",
    "layer": "backbone.layers.{}.",
}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("layer_norm_epsilon", 1e-5))
    only_silu(fields)
    falcon = fields["model_type"] == "falcon_mamba"
    mixer = mamba.Config(
        d_state=fields["state_size"],
        width=fields.get("intermediate_size", fields.get("expand", 2) * fields["hidden_size"]),
        conv_width=fields["conv_kernel"],
        conv_bias=fields.get("use_conv_bias", True),
        bias=fields.get("use_bias", False),
        dt_rank=rank(fields, "time_step_rank"),
        norm="plain" if falcon else "none",
        norm_eps=fields.get("mixer_rms_eps", 1e-6),
    )
    layer = block.Config(mixer=mixer, join=block.Join(norm=norms))
    return decoder.config(fields, tensors, lambda n: layer, norm=norms, **NAMES)


def rules(config: lm.Config) -> list[Rule]:
    layer = lambda b: [
        *norm_rules("mixer_norm", "norm"),
        *mixer_rules(b.mixer, config.d_model, "mixer", "mixer"),
    ]
    return decoder.rules(config, layer, final="backbone.norm_f", **NAMES)


def mixer_rules(c: mamba.Config, d_model: int, ours: str, theirs: str) -> list[Rule]:
    """in_proj has the rows [u | z], x_proj [r | b | c]."""
    inner = c.inner(d_model)
    both = lambda part: tuple(f"{ours}.{name}.{part}" for name in "uz")
    return [
        rule(both("weight"), f"{theirs}.in_proj.weight", split(inner, inner), TRANSPOSE),
        rule(both("bias"), f"{theirs}.in_proj.bias", split(inner, inner)),
        *conv(f"{ours}.conv", f"{theirs}.conv1d", c.conv_width),
        *linear(f"{ours}.select", f"{theirs}.x_proj"),
        rule(f"{ours}.dt.weight", f"{theirs}.dt_proj.weight", TRANSPOSE),
        rule(f"{ours}.dt_bias", f"{theirs}.dt_proj.bias"),
        *(rule(f"{ours}.{name}", f"{theirs}.{name}") for name in ("A_log", "D")),
        *linear(f"{ours}.out", f"{theirs}.out_proj"),
    ]


def rank(fields: Fields, name: str) -> int | None:
    """The rank of dt; None is the mixer's own default, which is theirs."""
    given = fields.get(name, "auto")
    return None if given == "auto" else given


def only_silu(fields: Fields) -> None:
    """Raises ModelError for another activation than the mixer has."""
    if activation(fields) != "silu":
        raise ModelError(
            f"hidden_act={fields['hidden_act']!r}: this family is read with silu only."
        )
