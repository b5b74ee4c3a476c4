"""GPT-NeoX (Black et al., 2022), which Pythia is: attention and perceptron side by side."""

from seqlab.layers import norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, linear, reshape, rule, split

MODEL_TYPES = ("gpt_neox",)
EMBED, HEAD = "gpt_neox.embed_in.weight", "embed_out.weight"
LAYER, NORM = "gpt_neox.layers.{}.", "gpt_neox.final_layer_norm"
TIED = (EMBED, HEAD)

#: A perceptron of two layers.
PLAIN = {"gated": False, "bias": True}


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(kind="layer", eps=fields.get("layer_norm_eps", 1e-5))
    bias = fields.get("attention_bias", True)
    layer = block.Config(
        mixer=llama.mixer(fields, **fields.rope(fraction=0.25), qkv_bias=bias, out_bias=bias),
        ffn=llama.mlp(fields, activation=llama.activation(fields, usual="gelu"), **PLAIN),
        join=block.Join(norm=norms),
        parallel="own_norm" if fields.get("use_parallel_residual", True) else None,
    )
    return decoder.config(
        fields, tensors, lambda _: layer, embed=EMBED, head=HEAD, layer=LAYER, norm=norms
    )


def rules(config: lm.Config) -> list[Rule]:
    layer = lambda one: [
        *llama.NORMS,
        *_qkv(one.mixer.heads, config.d_model // one.mixer.heads),
        *linear("mixer.out", "attention.dense"),
        *linear("ffn.up", "mlp.dense_h_to_4h"),
        *linear("ffn.down", "mlp.dense_4h_to_h"),
    ]
    return decoder.rules(config, layer, embed=EMBED, head=HEAD, layer=LAYER, final=NORM)


def _qkv(H: int, K: int) -> list[Rule]:
    """Its rows are those of q, k and v of the first head, then of the second, and so on."""
    named = lambda part: [f"mixer.{name}.{part}" for name in "qkv"]
    heads = lambda *rest: [
        reshape((3 * H * K, *rest), (H, 3 * K, *rest)),
        split(K, K, K, axis=1),
        reshape((H, K, *rest), (H * K, *rest)),
    ]
    theirs = "attention.query_key_value"
    return [
        rule(named("weight"), f"{theirs}.weight", *heads(-1), TRANSPOSE),
        rule(named("bias"), f"{theirs}.bias", *heads()),
    ]
