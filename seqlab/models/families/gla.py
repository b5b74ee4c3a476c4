"""GLA and RetNet as fla-hub publishes them: q, k, v, an output gate and a norm of each head."""

import json

from seqlab.layers.mixers import gla, retnet
from seqlab.models import decoder, fla, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, linear, norm

MODEL_TYPES = ("gla", "retnet")
TIED = fla.TIED


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    heads = fields["num_heads"]
    fla.check(fields, num_kv_heads=heads, use_gv=False, use_gk=True, hidden_act="swish")
    more = {
        "heads": heads,
        "conv_width": fields.get("conv_size", 4) if fields.get("use_short_conv") else 0,
        "gate": fields.get("use_output_gate", True),
        "norm_eps": fla.eps(fields),
    }
    expand = lambda k, v: {
        "expand_k": fields.get("expand_k", k),
        "expand_v": fields.get("expand_v", v),
    }
    if fields["model_type"] == "retnet":
        mixer = retnet.Config(**more, **expand(1.0, 2.0))
    else:
        mixer = gla.Config(
            **more,
            **expand(0.5, 1.0),
            decay_rank=fla.width(tensors, "model.layers.0.attn.gk_proj.0.weight"),
            log_decay_min=fields.get("clamp_min"),
        )
    return fla.config(fields, tensors, lambda _: mixer)


def rules(config: lm.Config) -> list[Rule]:
    fused = json.loads(config.published or "{}").get("fuse_norm", True)

    def mixer(block) -> list[Rule]:
        c = block.mixer
        d_k, d_v = (int(config.d_model * expand) for expand in (c.expand_k, c.expand_v))
        return [
            *fla.side_by_side((d_k, d_k, d_v), conv=c.conv_width),
            *linear("mixer.decay_down", "attn.gk_proj.0"),
            *linear("mixer.decay_up", "attn.gk_proj.1"),
            *linear("mixer.gate", "attn.g_proj"),
            *norm("mixer.norm", f"attn.{'g_norm_swish_gate' if fused and c.gate else 'g_norm'}"),
            *linear("mixer.out", "attn.o_proj"),
        ]

    return fla.rules(config, mixer)
