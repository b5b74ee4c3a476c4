"""Zamba2: layers of Mamba-2, some of which also read a transformer block that several share.

Shared blocks are loaded once for each layer that uses them, and are exported only while they are
still the same. What adapts them to each layer is kept in the lists of the block that they share.
"""

import json
import re
from typing import Any

from seqlab.errors import ModelError
from seqlab.layers import norm
from seqlab.layers.mixers import mamba2 as mixers
from seqlab.layers.mixers import zamba2
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama, mamba2
from seqlab.models.hf_config import Fields, normalised
from seqlab.models.rearrange import Rule, linear
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("zamba2",)

NAMES = {
    "heads": "n_mamba_heads",
    "d_state": "mamba_d_state",
    "groups": "mamba_ngroups",
    "conv_width": "mamba_d_conv",
    "bias": "add_bias_linear",
}
KINDS = (*mamba2.RECURRENT, "hybrid")


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms, kinds = norm.Config(eps=fields["rms_norm_eps"]), fields["layers_block_type"]
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ModelError(f"The layer types {unknown} are not known here: mend layers_block_type.")
    recurrent = _recurrent(fields)
    plain = block.Config(mixer=recurrent, join=block.Join(norm=norms))
    hybrid = block.Config(mixer=_hybrid(fields, recurrent), join=block.Join(place="none"))
    layer = lambda n: hybrid if kinds[n] == "hybrid" else plain
    return decoder.config(fields, tensors, layer, norm=norms)


def _recurrent(fields: Fields) -> mixers.Config:
    inner = int(fields.get("mamba_expand", 2) * fields["hidden_size"])
    return mamba2.mixer(
        fields,
        NAMES,
        1e-5,
        head_dim=inner // fields["n_mamba_heads"],
        dt_limit=(fields.get("time_step_min", 1e-3), None),
    )


def _hybrid(fields: Fields, recurrent: mixers.Config) -> zamba2.Config:
    heads = fields["num_attention_heads"]
    if fields.get("num_key_value_heads", heads) != heads:
        raise ModelError("Zamba2 with fewer key heads than query heads is not known here.")
    rope = fields.rope() if fields.get("use_mem_rope", False) else {}
    return zamba2.Config(
        inner=recurrent,
        heads=heads,
        width=fields.get("intermediate_size", 4 * fields["hidden_size"]),
        activation=llama.activation(fields),
        rank=fields["adapter_rank"],
        adapt_attention=fields.get("use_shared_attention_adapter", False),
        bias=fields.get("add_bias_linear", False),
        max_length=fields.longest,
        rope_base=rope.get("rope_base"),
        rope_scaling=rope.get("rope_scaling"),
        norm_eps=fields["rms_norm_eps"],
    )


def rules(config: lm.Config) -> list[Rule]:
    blocks = [block for _, _, block in decoder.places(config)]
    hybrids = [n for n, block in enumerate(blocks) if isinstance(block.mixer, zamba2.Config)]
    kinds = normalised(json.loads(config.published or "{}")).get("num_mem_blocks", 1)
    found = decoder.rules(config, _layer, final="model.final_layernorm")
    place = lambda name: _shared(name, hybrids, kinds)
    return [one._replace(theirs=tuple(map(place, one.theirs))) for one in found]


def _shared(name: str, hybrids: list[int], kinds: int) -> str:
    """The name of a shared block's tensor, which stands in the first layer that uses the block."""
    found = re.match(r"model\.layers\.(\d+)\.shared_transformer\.", name)
    if found is None:
        return name
    use = hybrids.index(int(found[1]))
    first = f"model.layers.{hybrids[use % kinds]}.shared_transformer."
    return first + name[found.end() :].replace("_list.", f"_list.{use}.")


def _layer(block: Any) -> list[Rule]:
    if not isinstance(block.mixer, zamba2.Config):
        return [
            *norm_rules("mixer_norm", "input_layernorm"),
            *mamba2.mixer_rules(block.mixer, "mixer", "mamba"),
        ]
    inner: Any = block.mixer.inner
    shared = "shared_transformer."
    attention, mlp = shared + "self_attn.", shared + "feed_forward."
    return [
        *norm_rules("mixer.norm", shared + "input_layernorm"),
        *(
            rule
            for x in "qkv"
            for rule in _adapted(f"mixer.{x}", f"{attention}{x}_proj", f"{attention}linear_{x}")
        ),
        *linear("mixer.out", attention + "o_proj"),
        *norm_rules("mixer.ffn_norm", shared + "pre_ff_layernorm"),
        *_adapted("mixer.gate_up", mlp + "gate_up_proj", mlp + "gate_up_proj"),
        *linear("mixer.down", mlp + "down_proj"),
        *linear("mixer.linear", "linear"),
        *norm_rules("mixer.mixer_norm", "mamba_decoder.input_layernorm"),
        *mamba2.mixer_rules(inner, "mixer.mixer", "mamba_decoder.mamba"),
    ]


def _adapted(ours: str, base: str, adapter: str) -> list[Rule]:
    return [
        *linear(f"{ours}.base", base),
        *linear(f"{ours}.down", f"{adapter}_adapter_list.0"),
        *linear(f"{ours}.up", f"{adapter}_adapter_list.1"),
    ]
