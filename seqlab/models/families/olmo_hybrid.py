"""OLMo Hybrid: layers of a gated delta rule, normed before, and of attention, normed after."""

from seqlab.layers import norm
from seqlab.layers.mixers import attention
from seqlab.models import block, decoder, lm
from seqlab.models.families import llama, qwen3_next
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import TRANSPOSE, Rule, join, linear, reshape, rule, transpose
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("olmo_hybrid",)

#: Names that files may have where those of transformers have others.
ALIASES = (
    (r"\.input_layernorm\.", ".attention_layer_norm."),
    (r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),
)


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(eps=fields["rms_norm_eps"])
    bias = fields.get("attention_bias", False)
    turns = (fields.get("rope_parameters") or {}).get("rope_theta") is not None
    still = {} if turns else {"rope_base": None, "rope_scaling": None}
    attends = llama.mixer(
        fields, qk_norm=norms, qk_norm_over="width", qkv_bias=bias, out_bias=bias, **still
    )
    recurrent = qwen3_next.mixer(
        fields,
        norm_eps=1e-5,  # whatever rms_norm_eps is
        negative_eigenvalues=fields.get("linear_allow_neg_eigval", True),
    )

    def layer(n: int) -> block.Config:
        full = fields["layer_types"][n] == "full_attention"
        join = block.Join(norm=norms, place="after" if full else "before")
        mixer = attends if full else recurrent
        return block.Config(mixer=mixer, ffn=llama.mlp(fields), join=join)

    return decoder.config(fields, tensors, layer, norm=norms)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, _layer)


def _layer(block: block.Config) -> list[Rule]:
    if isinstance(block.mixer, attention.Config):
        return [*AFTER, *llama.ATTENTION, *llama.MLP]
    c = block.mixer
    d_k, d_v = c.key_heads * c.key_dim, c.value_heads * c.value_dim
    side_by_side = join(d_k, d_k, d_v, axis=1)
    each = lambda what: [f"linear_attn.{name}_{what}.weight" for name in "qkv"]
    taps = transpose(2, 1, 0), reshape((c.conv_width, 1, -1), (c.conv_width, -1))
    return [
        *BEFORE,
        rule("mixer.qkv.weight", each("proj"), TRANSPOSE, side_by_side),
        rule("mixer.conv.weight", each("conv1d"), *taps, side_by_side),
        *RECURRENT,
        *llama.MLP,
    ]


BEFORE = [
    *norm_rules("mixer_norm", "attention_layer_norm"),
    *norm_rules("ffn_norm", "feedforward_layer_norm"),
]
AFTER = [
    *norm_rules("mixer_norm", "feedforward_layer_norm"),  # of the mixer, as transformers writes it
    *norm_rules("ffn_norm", "post_feedforward_layernorm"),
]
RECURRENT = [
    *linear("mixer.beta", "linear_attn.b_proj"),
    *linear("mixer.dt", "linear_attn.a_proj"),
    *linear("mixer.gate", "linear_attn.g_proj"),
    rule("mixer.A_log", "linear_attn.A_log"),
    rule("mixer.dt_bias", "linear_attn.dt_bias"),
    *norm_rules("mixer.norm", "linear_attn.o_norm"),
    *linear("mixer.out", "linear_attn.o_proj"),
]
