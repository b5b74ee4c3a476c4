"""SmolLM3: Llama in which every fourth layer has no positions."""

from seqlab.layers import norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields

MODEL_TYPES = ("smollm3",)

#: What files need not say.
DEFAULTS = {
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 11008,
    "rope_theta": 2e6,
}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    fields = fields.over(DEFAULTS)
    norms = norm.Config(eps=fields.get("rms_norm_eps", 1e-6))
    bias, mlp = fields.get("attention_bias", False), fields.get("mlp_bias", False)

    def layer(n: int) -> block.Config:
        turned = _turned(fields, n)
        mixer = llama.mixer(
            fields,
            window=_window(fields, n, turned),
            qkv_bias=bias,
            out_bias=bias,
            **({} if turned else {"rope_base": None, "rope_scaling": None}),
        )
        return block.Config(mixer, llama.mlp(fields, bias=mlp), join=block.Join(norm=norms))

    return decoder.config(fields, tensors, layer, norm=norms)


rules = llama.rules


def _turned(fields: Fields, n: int) -> bool:
    """Whether layer n has rotary positions."""
    if "no_rope_layers" in fields:  # true where they are not missing
        return bool(fields["no_rope_layers"][n])
    return (n + 1) % fields.get("no_rope_layer_interval", 4) > 0


def _window(fields: Fields, n: int, turned: bool) -> int | None:
    kinds = fields.get("layer_types")
    slides = not turned if kinds is None else kinds[n] == "sliding_attention"
    return fields.get("sliding_window") if slides and fields.get("use_sliding_window") else None
