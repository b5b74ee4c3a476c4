"""RWKV-7 as fla-hub publishes it."""

from seqlab.layers import norm
from seqlab.layers.mixers import rwkv7, rwkv7_channel_mix
from seqlab.models import block, decoder, fla, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, reshape, rule, stack
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("rwkv7",)
TIED = fla.TIED


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fla.check(fields, hidden_act="sqrelu")
    norms = norm.Config(
        kind="layer", eps=fields.get("norm_eps", 1e-5), bias=fields.get("norm_bias", True)
    )
    n = decoder.depth(fields, tensors)
    fla.check(fields, value_dim=[fields["hidden_size"]] * n)
    rows = lambda name, layer=0: fla.width(tensors, decoder.LAYER.format(layer) + name)
    rank = lambda name, layer=0: rows(f"attn.{name}_lora.lora.0.weight", layer)
    head_dim = fields.get("head_dim", 64)

    def layer(first: bool) -> block.Config:
        mixer = rwkv7.Config(
            heads=fields["hidden_size"] // head_dim,
            first=first,
            decay_rank=rank("w"),
            rate_rank=rank("a"),
            value_rank=None if first else rank("v", 1),
            gate_rank=rank("g"),
            norm_eps=head_dim * norms.eps,
        )
        ffn = rwkv7_channel_mix.Config(width=rows("ffn.key.weight"))
        return block.Config(mixer=mixer, ffn=ffn, join=block.Join(norm=norms))

    return decoder.config(
        fields,
        tensors,
        lambda n: layer(n == 0),
        embed=fla.EMBED,
        norm=norms,
        embed_norm=norms if fields.get("norm_first", True) else None,
    )


def rules(config: lm.Config) -> list[Rule]:
    return [
        *decoder.rules(config, lambda _: LAYER, embed=fla.EMBED),
        *norm_rules("embed_norm", "model.layers.0.pre_norm"),
    ]


def _bottleneck(ours: str, name: str) -> list[Rule]:
    theirs = f"attn.{name}_lora.lora"
    return [
        *linear(f"mixer.{ours}.down", f"{theirs}.0"),
        rule(f"mixer.{ours}.up", f"{theirs}.2.weight", TRANSPOSE),
        rule(f"mixer.{ours}.bias", f"{theirs}.2.bias"),
    ]


LAYER = [
    *norm_rules("mixer_norm", "attn_norm"),
    *norm_rules("ffn_norm", "ffn_norm"),
    rule(
        "mixer.mu",
        [f"attn.x_{name}" for name in rwkv7.SEEN],
        reshape((1, 1, -1), (-1,)),
        stack(len(rwkv7.SEEN)),
    ),
    *_bottleneck("decay", "w"),
    *_bottleneck("rate", "a"),
    *_bottleneck("value", "v"),
    *_bottleneck("gate", "g"),
    *linear("mixer.r", "attn.r_proj"),
    *linear("mixer.k", "attn.k_proj"),
    *linear("mixer.v", "attn.v_proj"),
    rule("mixer.removal", "attn.k_k"),
    rule("mixer.replacement", "attn.k_a"),
    rule("mixer.bonus", "attn.r_k"),
    *norm_rules("mixer.norm", "attn.g_norm"),
    *linear("mixer.out", "attn.o_proj"),
    rule("ffn.mu", "ffn.x_k"),
    *linear("ffn.key", "ffn.key"),
    *linear("ffn.value", "ffn.value"),
]
