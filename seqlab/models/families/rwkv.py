"""RWKV-4 ("Raven", "Pile") as transformers has it."""

from typing import Any

from seqlab.layers import norm
from seqlab.layers.mixers import rwkv4, rwkv4_channel_mix
from seqlab.models import block, decoder, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, linear, reshape, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("rwkv",)

NAMES: dict[str, Any] = {
    "embed": "rwkv.embeddings.weight",
    "head": "head.weight",
    "layer": "rwkv.blocks.{}.",
}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(kind="layer", eps=fields.get("layer_norm_epsilon", 1e-5))
    layer = block.Config(
        mixer=rwkv4.Config(width=fields.get("attention_hidden_size")),
        ffn=rwkv4_channel_mix.Config(width=fields.get("intermediate_size")),
        join=block.Join(norm=norms),
    )
    # `rescale_every` halves hidden states and weights alike, against overflow in float16
    final = norm.Config(kind="layer", eps=1e-5)
    return decoder.config(fields, tensors, lambda n: layer, norm=final, embed_norm=norms, **NAMES)


def rules(config: lm.Config) -> list[Rule]:
    found = decoder.rules(config, lambda _: LAYER, final="rwkv.ln_out", **NAMES)
    return [*found, *norm_rules("embed_norm", "rwkv.blocks.0.pre_ln")]


def _mixed(ours: str, theirs: str, names: dict[str, str]) -> list[Rule]:
    """The weights that mix a token with the one before it."""
    flat = reshape((1, 1, -1), (-1,))
    return [rule(f"{ours}.mu_{a}", f"{theirs}.time_mix_{b}", flat) for a, b in names.items()]


LAYER = [
    *norm_rules("mixer_norm", "ln1"),
    *norm_rules("ffn_norm", "ln2"),
    *_mixed("mixer", "attention", {"k": "key", "v": "value", "r": "receptance"}),
    rule("mixer.decay", "attention.time_decay"),
    rule("mixer.bonus", "attention.time_first"),
    *(r for n in ("key", "value", "receptance") for r in linear(f"mixer.{n}", f"attention.{n}")),
    *linear("mixer.out", "attention.output"),
    *_mixed("ffn", "feed_forward", {"k": "key", "r": "receptance"}),
    *(r for n in ("key", "value", "receptance") for r in linear(f"ffn.{n}", f"feed_forward.{n}")),
]
