"""What the checkpoints of flash-linear-attention (fla-hub) have in common.

The files of `seqlab.models.families` are written with this.
"""

from collections.abc import Callable, Iterable
from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import ffn, norm
from seqlab.models import block, decoder, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, join, linear, reshape, rule, transpose
from seqlab.models.rearrange import norm as norm_rules

EMBED = "model.embeddings.weight"
TIED = (EMBED, decoder.HEAD)

#: Fields that change what a model computes, and the values of them that are known here.
PLAIN = {"attn": None, "attnres_block_size": None, "feature_map": None, "elementwise_affine": True}


def config(
    fields: Fields, tensors: decoder.Tensors, mixer: Callable[[int], Any], **more: Any
) -> lm.Config:
    """The model whose layer n mixes with `mixer(n)` and then with a SwiGLU."""
    norms = norm.Config(eps=eps(fields))
    inner = width(tensors, decoder.LAYER.format(0) + "mlp.gate_proj.weight")
    layer = lambda n: block.Config(
        mixer=mixer(n), ffn=ffn.Config(width=inner), join=block.Join(norm=norms)
    )
    return decoder.config(fields, tensors, layer, embed=EMBED, norm=norms, **more)


def rules(config: lm.Config, mixer: Callable[[block.Config], Iterable[Rule]]) -> list[Rule]:
    """The rules of such a model, given those of a mixer."""
    layers = lambda block: [*NORMS, *mixer(block), *MLP]
    return decoder.rules(config, layers, embed=EMBED)


def check(fields: Fields, **known: Any) -> None:
    """Raise ModelError where a field has a value that is not known here."""
    for name, value in (PLAIN | known).items():
        given = fields.get(name, value)
        if given != value:
            raise ModelError(
                f"config.json has {name}={given!r}, and a {fields['model_type']} is read only with "
                f"{name}={value!r}: take a checkpoint without it."
            )


def eps(fields: Fields) -> float:
    return fields.get("norm_eps", 1e-6)


def width(tensors: decoder.Tensors, name: str) -> int:
    """How many rows a tensor has."""
    if name not in tensors:
        raise ModelError(f"The tensor {name!r} is missing: get the files of the whole model.")
    return tensors[name].shape[0]


def side_by_side(sizes: tuple[int, ...], names: str = "qkv", conv: int = 0) -> list[Rule]:
    """Linear maps of one input, which are one of ours, and the convolutions behind them."""
    each = lambda what: [f"attn.{name}_{what}.weight" for name in names]
    joined = [rule("mixer.qkv.weight", each("proj"), TRANSPOSE, join(*sizes, axis=1))]
    if conv:
        taps = transpose(2, 1, 0), reshape((conv, 1, -1), (conv, -1))
        joined.append(rule("mixer.conv.weight", each("conv1d"), *taps, join(*sizes, axis=1)))
    return joined


NORMS = [*norm_rules("mixer_norm", "attn_norm"), *norm_rules("ffn_norm", "mlp_norm")]
MLP = [
    *linear("ffn.gate", "mlp.gate_proj"),
    *linear("ffn.up", "mlp.up_proj"),
    *linear("ffn.down", "mlp.down_proj"),
]
