"""The MatMul-free LM and BitNet as they are published compute what their definitions say."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
import transformers

from tests import hf_models
from tests.fla_models import LAYERS, D, hold, rms, under
from tests.hf_models import TINY

INNER = 64


def bit(x, w, name, eps=1e-6, bits=127):
    """x through one of their linear maps, in plain torch"""
    x = rms(x, w[f"{name}.norm.weight"], eps)
    s = bits / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    x, weight = (x * s).round().clamp(-bits - 1, bits) / s, w[f"{name}.weight"]
    s = 1 / weight.abs().mean().clamp(min=1e-5)
    return x @ ((weight * s).round().clamp(-1, 1) / s).T


def mlgru(w, x, bound):
    f = bound + (1 - bound) * torch.sigmoid(bit(x, w, "f_proj"))
    i, h, out = F.silu(bit(x, w, "i_proj")) * (1 - f), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = f[:, t] * h + i[:, t]
        out.append(h)
    return bit(
        rms(bit(x, w, "g_proj"), w["g_norm.weight"]) * F.silu(torch.stack(out, 1)), w, "o_proj"
    )


def forward(weights, tokens):
    weights = {n: w.double() for n, w in weights.items()}
    x = weights["model.embeddings.weight"][tokens]
    p = weights["model.lower_bounds"].softmax(0)
    bounds = p.cumsum(0) - p[0]
    for n in range(LAYERS):
        w = under(weights, f"model.layers.{n}.")
        x = x + mlgru(under(w, "attn."), rms(x, w["attn_norm.weight"]), bounds[n])
        mlp = under(w, "mlp.")
        gate, y = bit(rms(x, w["mlp_norm.weight"]), mlp, "gate_proj").chunk(2, -1)
        x = x + bit(F.silu(gate) * y, mlp, "down_proj")
    return bit(rms(x, weights["model.norm.weight"]), weights, "lm_head").float()


SHAPES = {
    "*attn_norm.weight": (D,),
    "*mlp_norm.weight": (D,),
    "model.norm.weight": (D,),
    "model.lower_bounds": (LAYERS, D),
    "lm_head.norm.weight": (D,),
    "*attn.g_norm.weight": (D,),
    "*mlp.gate_proj.weight": (2 * INNER, D),
    "*mlp.gate_proj.norm.weight": (D,),
    "*mlp.down_proj.weight": (D, INNER),
    "*mlp.down_proj.norm.weight": (INNER,),
    **{f"*attn.{n}_proj.weight": (D, D) for n in "ifgo"},
    **{f"*attn.{n}_proj.norm.weight": (D,) for n in "ifgo"},
}


def test_the_matmul_free_lm_is_the_published_one(tmp_path):
    fields = {"model_type": "hgrn_bit", "num_heads": 1, "expand_ratio": 1, "hidden_act": "swish"}
    hold(tmp_path, fields, SHAPES, forward)


@pytest.fixture
def bitnet(monkeypatch):
    """transformers' BitNet, without the compiler and the package that it asks for and can miss."""
    monkeypatch.setattr(torch, "compile", lambda f: f)
    integration = importlib.import_module("transformers.integrations.bitnet")
    quantizer = importlib.import_module("transformers.quantizers.quantizer_bitnet")
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    return integration


def rounded(bitnet, model):
    """Every linear map but the head becomes one that transformers rounds while it runs."""
    for name, old in list(model.named_modules()):
        if isinstance(old, torch.nn.Linear) and name != "lm_head":
            new = bitnet.AutoBitLinear(
                old.in_features, old.out_features, old.bias is not None, online_quant=True
            )
            new.weight, new.bias = old.weight, old.bias
            model.set_submodule(name, new)
    model.config.quantization_config = transformers.BitNetQuantConfig(
        linear_class="autobitlinear", quantization_mode="online"
    )


def test_bitnet_is_that_of_transformers(tmp_path, bitnet):
    adjust = functools.partial(rounded, bitnet)
    model = hf_models.hold(transformers.BitNetConfig(**TINY), tmp_path, adjust)
    assert len(model.blocks) == 1, "its layers are alike, so one program serves all"
