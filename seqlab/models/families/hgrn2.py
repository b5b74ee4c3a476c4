"""HGRN2 as fla-hub publishes it: the lower bounds of all layers are one table of the model."""

from seqlab.layers.mixers import hgrn2
from seqlab.models import decoder, fla, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, copies, linear, norm, rule

MODEL_TYPES = ("hgrn2",)
TIED = fla.TIED


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fla.check(fields, use_short_conv=False, hidden_act="swish")
    depth = decoder.depth(fields, tensors)
    bounded = fields.get("use_lower_bound", True)
    ratio = fields.get("expand_ratio") or fields["hidden_size"] // fields["num_heads"]
    # whatever norm_eps is, the norm behind the memory has 1e-5: fla does not hand it on
    mixer = lambda n: hgrn2.Config(
        key_dim=ratio, layer=n if bounded else 0, layers=depth, norm_eps=1e-5
    )
    return fla.config(fields, tensors, mixer)


def rules(config: lm.Config) -> list[Rule]:
    found = fla.rules(config, lambda _: MIXER)
    layers = ((at, block.mixer) for at, _, block in decoder.places(config))
    bounded = [at + "mixer.bounds" for at, mixer in layers if mixer is not None and mixer.layer]
    if bounded:
        # layers that differ are never folded: each is a block of a pattern that is there once
        one = rule(bounded, "model.lower_bounds", copies(len(bounded)))
        found.append(one._replace(repeat=0))
    return found


MIXER = [
    *linear("mixer.q", "attn.q_proj"),
    *linear("mixer.f", "attn.f_proj"),
    *linear("mixer.v", "attn.i_proj"),
    *norm("mixer.norm", "attn.g_norm"),
    *linear("mixer.out", "attn.o_proj"),
]
