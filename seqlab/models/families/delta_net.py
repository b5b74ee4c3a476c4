"""DeltaNet, Gated DeltaNet and Kimi Delta Attention as fla-hub publishes them."""

from typing import Any

from seqlab.layers.mixers import delta_net, gated_delta_net, kda
from seqlab.models import decoder, fla, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, linear, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("delta_net", "gated_deltanet", "kda")
TIED = fla.TIED


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    kind = fields["model_type"]
    fla.check(fields, hidden_act="swish", use_output_norm=True, conv_bias=False)
    more = {
        "conv_width": fields.get("conv_size", 4) if fields.get("use_short_conv", True) else 0,
        "negative_eigenvalues": fields.get("allow_neg_eigval", False),
        "norm_eps": fla.eps(fields),
    }
    mixer = {"delta_net": _plain, "gated_deltanet": _gated, "kda": _by_channel}[kind](fields, more)
    return fla.config(fields, tensors, lambda _: mixer)


def _plain(fields: Fields, more: dict[str, Any]) -> delta_net.Config:
    return delta_net.Config(
        heads=fields.get("num_heads", 16),
        expand_k=fields.get("expand_k", 1.0),
        expand_v=fields.get("expand_v", 1.0),
        activation=fields.get("qk_activation", "silu"),
        qk_norm=fields.get("qk_norm", "l2"),
        beta=fields.get("use_beta", True),
        gate=fields.get("use_gate", False),
        **more,
    )


def _gated(fields: Fields, more: dict[str, Any]) -> gated_delta_net.Config:
    heads, key_dim = fields.get("num_heads", 6), fields.get("head_dim", 256)
    return gated_delta_net.Config(
        key_heads=heads,
        value_heads=fields.get("num_v_heads", heads),
        key_dim=key_dim,
        value_dim=int(key_dim * fields.get("expand_v", 2.0)),
        gate=fields.get("use_gate", True),
        **more,
    )


def _by_channel(fields: Fields, more: dict[str, Any]) -> kda.Config:
    heads, key_dim = fields.get("num_heads", 16), fields.get("head_dim", 128)
    fla.check(fields, num_v_heads=heads)
    value_dim = int(key_dim * fields.get("expand_v", 1.0))
    return kda.Config(
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        rank=value_dim,
        gate_bias=True,
        lowest_decay=fields.get("lower_bound") if fields.get("safe_gate") else None,
        **more,
    )


def rules(config: lm.Config) -> list[Rule]:
    return fla.rules(config, lambda block: _rules(block.mixer, config.d_model))


def _rules(c: Any, d_model: int) -> list[Rule]:
    if isinstance(c, delta_net.Config):
        d_k, d_v = int(d_model * c.expand_k), int(d_model * c.expand_v)
    elif isinstance(c, gated_delta_net.Config):
        d_k, d_v = c.key_heads * c.key_dim, c.value_heads * c.value_dim
    else:
        d_k, d_v = c.heads * c.key_dim, c.heads * c.value_dim
    return [*fla.side_by_side((d_k, d_k, d_v), conv=c.conv_width), *MIXER]


#: Of all three: rules of weights that a mixer lacks do not apply.
MIXER = [
    *linear("mixer.beta", "attn.b_proj"),
    *linear("mixer.dt", "attn.a_proj"),
    rule("mixer.A_log", "attn.A_log"),
    rule("mixer.dt_bias", "attn.dt_bias"),
    *linear("mixer.decay_down", "attn.f_proj.0"),
    *linear("mixer.decay_up", "attn.f_proj.1"),
    *linear("mixer.gate", "attn.g_proj"),
    *linear("mixer.gate_down", "attn.g_proj.0"),
    *linear("mixer.gate_up", "attn.g_proj.1"),
    *norm_rules("mixer.norm", "attn.o_norm"),
    *linear("mixer.out", "attn.o_proj"),
]
