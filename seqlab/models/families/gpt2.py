"""GPT-2 (Radford et al., 2019), with or without the prefix that its oldest files lack.

Its positions are a block of their own, so that layer 0 of the file is block 1 here.
"""

from seqlab.layers import ffn, norm
from seqlab.layers.mixers import attention, learned_positions
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, rule, split
from seqlab.models.rearrange import norm as untransposed

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
EMBED, POSITIONS = f"{PREFIX}wte.weight", f"{PREFIX}wpe.weight"
LAYER, NORM = f"{PREFIX}h.{{}}.", f"{PREFIX}ln_f"
TIED = (EMBED, decoder.HEAD)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(kind="layer", eps=fields.get("layer_norm_eps", 1e-5))
    mlp = ffn.Config(
        width=fields.get("intermediate_size", 4 * fields["hidden_size"]),
        activation=llama.activation(fields, usual="gelu_new"),
        gated=False,
        bias=True,
    )
    join = block.Join(norm=norms)
    layer = lambda n: block.Config(mixer=_mixer(fields, n), ffn=mlp, join=join)
    positions = block.Config(
        mixer=learned_positions.Config(max_length=fields["max_position_embeddings"]),
        join=block.Join(place="none"),
    )
    return decoder.config(
        fields, tensors, layer, embed=EMBED, layer=LAYER, before=(positions,), norm=norms
    )


def rules(config: lm.Config) -> list[Rule]:
    """Its linear maps are stored as ours, [in, out], those of q, k and v as one."""
    ours, repeat, _ = decoder.places(config)[0]
    table = decoder.within(rule("mixer.table", POSITIONS), ours, "", repeat)
    third = (config.d_model,) * 3
    layer = [
        *untransposed("mixer_norm", "ln_1"),
        *untransposed("ffn_norm", "ln_2"),
        rule(_qkv("weight"), "attn.c_attn.weight", split(*third, axis=1)),
        rule(_qkv("bias"), "attn.c_attn.bias", split(*third)),
        *untransposed("mixer.out", "attn.c_proj"),
        *untransposed("ffn.up", "mlp.c_fc"),
        *untransposed("ffn.down", "mlp.c_proj"),
    ]
    layers = decoder.rules(config, lambda _: layer, embed=EMBED, layer=LAYER, final=NORM, before=1)
    return [table, *layers]


def respelled(tensors: decoder.Tensors) -> dict:
    """The oldest files are of the model without its head, and name nothing of the whole."""
    if EMBED in tensors:
        return dict(tensors)
    return {name if name == decoder.HEAD else PREFIX + name: a for name, a in tensors.items()}


def _mixer(fields: Fields, n: int) -> attention.Config:
    heads = fields["num_attention_heads"]
    scaled = fields.get("scale_attn_weights", True)
    scale = (fields["hidden_size"] // heads) ** -0.5 if scaled else 1.0
    if fields.get("scale_attn_by_inverse_layer_idx", False):
        scale /= n + 1
    return attention.Config(
        heads=heads,
        max_length=fields.longest,
        rope_base=None,
        qkv_bias=True,
        out_bias=True,
        scale=scale,
    )


def _qkv(part: str) -> list[str]:
    return [f"mixer.{name}.{part}" for name in "qkv"]
