"""The MatMul-free LM (Zhu et al., 2024) as its authors publish it: MLGRU, GLU, ternary weights."""

import dataclasses
from typing import Any

from seqlab.layers import bit_linear, ffn, norm
from seqlab.layers.mixers import mlgru
from seqlab.models import block, decoder, fla, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, copies, linear, rule
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("hgrn_bit",)
TIED = fla.TIED

#: Their norms say 1e-8, but the fused layer that models are made of does not hand it on.
LINEAR = bit_linear.Config(eps=1e-6)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    known = {"use_short_conv": False, "expand_ratio": 1, "hidden_act": "swish"}
    fla.check(fields, **known, tie_word_embeddings=False)
    depth, eps = decoder.depth(fields, tensors), fields.get("rms_norm_eps", 1e-6)
    bounded, norms = fields.get("use_lower_bound", True), norm.Config(eps=eps)
    width = fla.width(tensors, decoder.LAYER.format(0) + "mlp.gate_proj.weight") // 2
    layer = lambda n: block.Config(
        mixer=mlgru.Config(layer=n if bounded else 0, layers=depth if bounded else 1, norm_eps=eps),
        ffn=ffn.Config(width=width, joined=True),
        join=block.Join(norm=norms),
    )
    return decoder.config(fields, tensors, layer, embed=fla.EMBED, norm=norms, linear=LINEAR)


def rules(config: lm.Config) -> list[Rule]:
    found = decoder.rules(config, lambda _: LAYER, embed=fla.EMBED)
    found += norm_rules("head.norm", "lm_head.norm")
    layers = ((at, block.mixer) for at, _, block in decoder.places(config))
    bounded = [at + "mixer.bounds" for at, mixer in layers if mixer is not None and mixer.layer]
    if bounded:
        # layers that differ are never folded: each is a block of a pattern that is there once
        one = rule(bounded, "model.lower_bounds", copies(len(bounded)))
        found.append(one._replace(repeat=0))
    return found


def describe(config: lm.Config) -> tuple[dict[str, Any], lm.Config] | None:
    """config.json of a model that may be one of these, and its config written out."""
    layers = [block for _, _, block in decoder.places(config)]
    mixers = [one.mixer for one in layers if isinstance(one.mixer, mlgru.Config)]
    mlp = layers[0].ffn
    if len(mixers) < len(layers) or not isinstance(mlp, ffn.Config):
        return None
    bounded = any(mixer.layer for mixer in mixers)
    fields = {
        "model_type": "hgrn_bit",
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(layers),
        "num_heads": 1,
        "expand_ratio": 1,
        "use_short_conv": False,
        "use_lower_bound": bounded,
        "hidden_ratio": 4,
        "intermediate_size": mlp.inner(config.d_model),
        "hidden_act": "swish",
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    depth = len(layers) if bounded else 1
    written = tuple(_written_out(one, depth, config.d_model) for one in layers)
    return fields, dataclasses.replace(config, before=(), pattern=written, repeats=1, after=())


def _written_out(one: block.Config, depth: int, d_model: int) -> block.Config:
    mixer, mlp = one.mixer, one.ffn
    if isinstance(mixer, mlgru.Config) and mixer.layer == 0:  # no bound: of how many is no matter
        mixer = dataclasses.replace(mixer, layers=depth)
    mlp = mlp.written_out(d_model) if isinstance(mlp, ffn.Config) else mlp
    return dataclasses.replace(one, mixer=mixer, ffn=mlp)


def _bit(ours: str, theirs: str) -> list[Rule]:
    """A linear map with a norm of its own."""
    return [*linear(ours, theirs), *norm_rules(f"{ours}.norm", f"{theirs}.norm")]


LAYER = [
    *fla.NORMS,
    *_bit("mixer.forget", "attn.f_proj"),
    *_bit("mixer.candidate", "attn.i_proj"),
    *_bit("mixer.gate", "attn.g_proj"),
    *norm_rules("mixer.norm", "attn.g_norm"),
    *_bit("mixer.out", "attn.o_proj"),
    *_bit("ffn.up", "mlp.gate_proj"),
    *_bit("ffn.down", "mlp.down_proj"),
]
