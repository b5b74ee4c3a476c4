"""Nemotron-H, Nemotron 3: a layer is Mamba-2, attention, a perceptron or a mixture of experts."""

from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import ffn, moe, norm
from seqlab.layers.mixers import mamba2 as mixers
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama, mamba2
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, rule, stack
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("nemotron_h",)
TIED = mamba2.TIED
IGNORED = (r"mtp\..*",)  # predicts several tokens ahead; of no use to the model itself

NAMES = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "d_state": "ssm_state_size",
    "groups": "n_groups",
    "conv_width": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
ACTIVATION = {"mlp_hidden_act": "relu2"}  # where config.json does not say
LETTERS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
LAYER = "backbone.layers.{}."


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields.get("layer_norm_epsilon", 1e-5))
    join = block.Join(norm=norms)
    kinds = fields.get("layers_block_type") or [
        LETTERS.get(letter, letter) for letter in fields["hybrid_override_pattern"]
    ]
    layer = lambda n: block.Config(**_layer(fields, kinds[n], norms.eps), join=join)
    return decoder.config(fields, tensors, layer, embed=mamba2.EMBED, layer=LAYER, norm=norms)


def _layer(fields: Fields, kind: str, eps: float) -> dict[str, Any]:
    """The one layer of a block of this kind."""
    if kind in mamba2.RECURRENT:
        act = llama.activation(fields, "mamba_hidden_act")
        lowest = fields.get("time_step_min", 1e-3)  # transformers reads no time_step_limit here
        return {"mixer": mamba2.mixer(fields, NAMES, eps, act=act, dt_limit=(lowest, None))}
    if kind in mamba2.ATTENTION:
        head_dim = fields.get("head_dim", fields.get("attention_head_dim", 128))
        return {"mixer": llama.mixer(fields, head_dim=head_dim, rope_base=None, rope_scaling=None)}
    if kind not in ("mlp", "moe"):
        raise ModelError(f"The layer type {kind!r} is not known here: mend layers_block_type.")
    described = {
        "activation": llama.activation(Fields(ACTIVATION | fields), "mlp_hidden_act"),
        "gated": False,
    }
    plain = lambda width: ffn.Config(
        width=fields[width], bias=fields.get("mlp_bias", False), **described
    )
    return {"ffn": plain("intermediate_size") if kind == "mlp" else _experts(fields, plain)}


def _experts(fields: Fields, plain) -> moe.Config:
    shared = plain("moe_shared_expert_intermediate_size")
    return moe.Config(
        experts=fields["n_routed_experts"],
        top_k=fields["num_experts_per_tok"],
        width=fields["moe_intermediate_size"],
        activation=shared.activation,
        gated=False,
        score="sigmoid",
        normalize=fields.get("norm_topk_prob", True),
        scale=fields.get("routed_scaling_factor", 1.0),
        correction=True,
        groups=fields.get("n_group", 1),
        top_groups=fields.get("topk_group", 1),
        latent=fields.get("moe_latent_size"),
        latent_bias=shared.bias,
        shared=shared,
    )


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _rules, embed=mamba2.EMBED, layer=LAYER, final="backbone.norm_f")


def _rules(block: block.Config) -> list[Rule]:
    names = norm_rules("mixer_norm" if block.mixer else "ffn_norm", "norm")
    if isinstance(block.mixer, mixers.Config):
        return [*names, *mamba2.mixer_rules(block.mixer, "mixer", "mixer")]
    if block.mixer is not None:
        return [*names, *mamba2.attention_rules("mixer", "mixer")]
    if isinstance(block.ffn, moe.Config):
        return [*names, *_expert_rules(block.ffn.experts)]
    return [*names, *mamba2.mlp_rules("ffn", "mixer")]


def _expert_rules(experts: int) -> list[Rule]:
    each = lambda name: [f"mixer.experts.{e}.{name}_proj.weight" for e in range(experts)]
    return [
        *linear("ffn.router", "mixer.gate"),
        rule("ffn.correction", "mixer.gate.e_score_correction_bias"),
        *(rule(f"ffn.{name}", each(name), TRANSPOSE, stack(experts)) for name in ("up", "down")),
        *linear("ffn.latent_down", "mixer.fc1_latent_proj"),
        *linear("ffn.latent_up", "mixer.fc2_latent_proj"),
        *mamba2.mlp_rules("ffn.shared", "mixer.shared_experts"),
    ]
