"""Phi (1, 1.5 and 2): attention and perceptron side by side behind one norm, a head with a bias."""

from seqlab.layers import norm
from seqlab.models import block, decoder, lm
from seqlab.models.families import gpt_neox, llama
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, linear
from seqlab.models.rearrange import norm as norm_rules

MODEL_TYPES = ("phi",)
NORM = "model.final_layernorm"


def config(fields: Fields, tensors: decoder.Tensors) -> lm.Config:
    norms = norm.Config(kind="layer", eps=fields.get("layer_norm_eps", 1e-5))
    layer = block.Config(
        mixer=llama.mixer(
            fields,
            **fields.rope(fraction=0.5),
            qkv_bias=True,
            out_bias=True,
            qk_norm=norms if fields.get("qk_layernorm", False) else None,
        ),
        ffn=llama.mlp(
            fields, activation=llama.activation(fields, usual="gelu_new"), **gpt_neox.PLAIN
        ),
        join=block.Join(norm=norms),
        parallel="one_norm",
    )
    return decoder.config(fields, tensors, lambda _: layer, norm=norms, head_bias=True)


def rules(config: lm.Config) -> list[Rule]:
    return decoder.rules(config, lambda _: LAYER, final=NORM)


LAYER = [
    *llama.NORMS,
    *linear("mixer.q", "self_attn.q_proj"),
    *linear("mixer.k", "self_attn.k_proj"),
    *linear("mixer.v", "self_attn.v_proj"),
    *linear("mixer.out", "self_attn.dense"),
    *norm_rules("mixer.q_norm", "self_attn.q_layernorm"),
    *norm_rules("mixer.k_norm", "self_attn.k_layernorm"),
    *linear("ffn.up", "mlp.fc1"),
    *linear("ffn.down", "mlp.fc2"),
]
