"""Mixture-of-Memories as fla-hub publishes it: memories of the gated delta rule."""

from typing import Any

from seqlab.layers.mixers import mom
from seqlab.models import decoder, fla, lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, norm, rule, stack

MODEL_TYPES = ("mom",)
TIED = fla.TIED


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fla.check(
        fields,
        hidden_act="swish",
        mom_backend="gated_deltanet",
        use_short_conv=True,
        conv_bias=False,
    )
    key_dim = fields.get("head_dim", 256)
    mixer = mom.Config(
        memories=fields.get("num_memories", 4),
        top_k=fields.get("topk", 2),
        shared_memory=fields.get("shared_mem", True),
        single_kv_proj=fields.get("single_kv_proj", False),
        heads=fields.get("num_heads", 4),
        key_dim=key_dim,
        value_dim=int(key_dim * fields.get("expand_v", 1.0)),
        conv_width=fields.get("conv_size", 4),
        gate=fields.get("use_output_gate", True),
        norm_eps=fla.eps(fields),
        aux_scale=fields.get("aux_loss_scale", 0.01),
    )
    return fla.config(fields, tensors, lambda _: mixer)


def rules(config: lm.Config) -> list[Rule]:
    return fla.rules(config, lambda block: _mixer(block.mixer))


def _mixer(c: Any) -> list[Rule]:
    d_k, d_v = c.heads * c.key_dim, c.heads * c.value_dim
    each = {"mixer.k": "k", "mixer.v": "v", "mixer.base.beta": "b", "mixer.base.dt": "a"}
    _, conv = fla.side_by_side((d_k, d_k, d_v), conv=c.conv_width)
    return [
        *linear("mixer.router", "attn.gate"),
        *linear("mixer.q", "attn.q_proj"),
        *(_stacked(c, ours, theirs) for ours, theirs in each.items()),
        conv,
        rule("mixer.base.A_log", "attn.A_log"),
        rule("mixer.base.dt_bias", "attn.dt_bias"),
        *linear("mixer.gate", "attn.g_proj"),
        *norm("mixer.norm", "attn.o_norm"),
        *linear("mixer.out", "attn.o_proj"),
    ]


def _stacked(c: mom.Config, ours: str, theirs: str) -> Rule:
    """The maps of all memories, the shared one last; one map is called shared if all have it."""
    own = 0 if c.single_kv_proj else c.memories
    names = [f"attn.{theirs}_proj.{m}.weight" for m in range(own)]
    if c.single_kv_proj or c.shared_memory:
        names.append(f"attn.shared_{theirs}.weight")
    return rule(ours, names, TRANSPOSE, stack(len(names)))
