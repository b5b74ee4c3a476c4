"""Gemma 1, 2 and 3: scaled embeddings, a window in most layers, capped scores, norms all around."""

from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import norm
from seqlab.layers.mixers import attention
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
IGNORED = (r"(.*\.)?(vision_tower|multi_modal_projector)\..*",)

#: What files need not say.
_ALL = {"head_dim": 256}
_SECOND = _ALL | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
DEFAULTS = {
    "gemma": _ALL
    | {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 24576,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": _SECOND
    | {
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _SECOND
    | {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
}
SLIDING = "sliding_attention"


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fields = fields.over(DEFAULTS[fields["model_type"]])
    if fields.get("use_bidirectional_attention"):
        raise ModelError(
            "use_bidirectional_attention of config.json lets tokens see those after them, which no "
            "model that continues texts does here: take a checkpoint without it."
        )
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-6), offset=True)
    join = block.Join(norm=norms, place="before" if _first(fields) else "both")
    mlp = llama.mlp(fields, activation=_activation(fields))
    layer = lambda n: block.Config(
        mixer=_attention(fields, norms, _slides(fields, n)), ffn=mlp, join=join
    )
    return decoder.config(
        fields,
        tensors,
        layer,
        norm=norms,
        embed_scale="root",
        logit_cap=fields.get("final_logit_softcapping"),
    )


def rules(config: lm.Config) -> list[Rule]:
    norms = lambda b: AROUND if b.join.place == "both" else llama.NORMS
    return decoder.rules(config, lambda b: [*norms(b), *llama.ATTENTION, *llama.MLP])


def _first(fields: Fields) -> bool:
    return fields["model_type"] == "gemma"


def _activation(fields: Fields) -> Any:
    given = llama.activation(fields, "hidden_act" if _first(fields) else "hidden_activation")
    return "gelu_tanh" if _first(fields) and given == "gelu" else given  # its first files mean this


def _slides(fields: Fields, n: int) -> bool:
    """Whether layer n has a window."""
    if "layer_types" in fields:
        return fields["layer_types"][n] == SLIDING
    return not _first(fields) and (n + 1) % fields["sliding_window_pattern"] > 0


def _attention(fields: Fields, norms: norm.Config, slides: bool) -> attention.Config:
    bias = fields.get("attention_bias", False)
    scalar = fields.get("query_pre_attn_scalar")
    third = fields["model_type"] == "gemma3_text"
    return llama.mixer(
        fields,
        window=fields.get("sliding_window") if slides else None,
        scale=scalar and scalar**-0.5,
        cap=fields.get("attn_logit_softcapping"),
        qk_norm=norms if third else None,
        qkv_bias=bias,
        out_bias=bias,
        **(_local_rope(fields) if third and slides else fields.rope()),
    )


def _local_rope(fields: Fields) -> dict[str, Any]:
    """The rotation of layers with a window, which older files say with one number."""
    stated = fields["rope_parameters"].get(SLIDING, {})
    local = {"rope_theta": fields["rope_local_base_freq"]} | stated
    return Fields({"rope_parameters": local}).rope()


AROUND = [
    *norm_rules("mixer_norm", "input_layernorm"),
    *norm_rules("mixer_post_norm", "post_attention_layernorm"),
    *norm_rules("ffn_norm", "pre_feedforward_layernorm"),
    *norm_rules("ffn_post_norm", "post_feedforward_layernorm"),
]
