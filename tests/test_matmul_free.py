"""The MatMul-free LM and BitNet as they are published compute what their definitions say."""

import functools
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

import seqlab
from seqlab.conformance.tolerance import assert_same_rounded_logits
from seqlab.errors import ModelError
from seqlab.layers import bit_linear, ffn, norm
from seqlab.layers.mixers import attention, mlgru
from seqlab.models import lm, tensors
from seqlab.models.families import hgrn_bit
from seqlab.models.parameters import parameters
from seqlab.models.summary import parameter_count
from seqlab.train.config import load
from tests import hf_models
from tests.fla_models import LAYERS, D, hold, rms, under
from tests.hf_folders import CONFIG, bits, write
from tests.hf_models import TINY

INNER = 64


def bit(x, w, name, eps=1e-6, bits=127):
    """x through one of their linear maps, in plain torch"""
    x = rms(x, w[f"{name}.norm.weight"], eps)
    s = bits / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    x, weight = (x * s).round().clamp(-bits - 1, bits) / s, w[f"{name}.weight"]
    s = 1 / weight.abs().mean().clamp(min=1e-5)
    return x @ ((weight * s).round().clamp(-1, 1) / s).T


def mixer(w, x, bound):
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
        x = x + mixer(under(w, "attn."), rms(x, w["attn_norm.weight"]), bounds[n])
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
    hold(tmp_path, fields, SHAPES, forward, same=assert_same_rounded_logits)


def test_a_model_of_ours_is_exported_as_the_published_ones_if_layers_share_no_bounds(tmp_path):
    fields = {"vocab": 97, "d_model": 32, "tie_embeddings": False, "linear": hgrn_bit.LINEAR}
    plain = {"ffn": ffn.Config(joined=True, down_std=0.1), "repeats": 2}
    model = seqlab.build(lm.Config(**fields, **plain, pattern=(mlgru.Config(layer=0),)))
    again = seqlab.load(seqlab.export_hf(model, tmp_path / "exported"))
    assert json.loads(again.config.published)["model_type"] == "hgrn_bit"
    assert bits(parameters(again)) == bits(parameters(model))
    dense = lm.Config(**fields | {"linear": "dense"}, **plain, pattern=(mlgru.Config(layer=0),))
    with pytest.raises(ModelError, match="No published family"):
        seqlab.export_hf(seqlab.build(dense), tmp_path / "dense")


@pytest.mark.parametrize(
    "name, lr, billions", [("370m", 4e-3, 0.37), ("1_3b", 2.5e-3, 1.37), ("2_7b", 1.5e-3, 2.70)]
)
def test_the_published_sizes_are_those_of_the_configs(name, lr, billions):
    config = load(f"configs/matmul_free_{name}.py")
    assert round(parameter_count(config.model.skeleton()) / 1e9, 2) == billions
    rate = config.optimizer.learning_rate(config.steps)
    middle = config.steps // 2
    assert float(rate(config.optimizer.warmup)) == pytest.approx(lr)
    assert float(rate(middle)) == pytest.approx(float(rate(middle - 1)) / 2, rel=1e-3)


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
    same = assert_same_rounded_logits
    model = hf_models.hold(transformers.BitNetConfig(**TINY), tmp_path, adjust, same=same)
    assert len(model.blocks) == 1, "its layers are alike, so one program serves all"


@pytest.mark.parametrize("normed", [False, True])
def test_a_model_of_ours_that_is_built_like_bitnet_is_exported_as_one(normed, tmp_path, bitnet):
    one = norm.Config()
    config = lm.Config(
        vocab=97,
        d_model=32,
        pattern=(attention.Config(max_length=64, kv_heads=2, out_norm=one),),
        repeats=2,
        ffn=ffn.Config(activation="relu2", norm=one),
        linear=bit_linear.Config(norm=normed, eps=1e-5, head=False),
    )
    model = seqlab.build(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        seqlab.export_hf(model, tmp_path / "exported"),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    linear = theirs.model.layers[0].mlp.down_proj
    assert theirs.config.model_type == "bitnet" and isinstance(linear, bitnet.AutoBitLinear)
    assert (linear.rms_norm is not None) == normed
    tokens = np.random.default_rng(0).integers(0, 97, (hf_models.B, hf_models.T), np.int32)
    expected = hf_models.torch_logits(theirs.eval(), tokens)
    assert_same_rounded_logits(hf_models.logits(model, tokens), expected)


def pack(bitnet, folder, target):
    """A folder with latent weights as the packed one that transformers reads "offline"."""
    held, packed = tensors.read(folder), {}
    for name, array in held.items():
        packed[name] = torch.tensor(array)
        if "_proj." in name:
            scale = packed[name].abs().mean()
            trits = (packed[name] / scale).round().clamp(-1, 1)
            packed[name] = bitnet.pack_weights(trits)
            packed[f"{name}_scale"] = scale[None]
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["quantization_mode"] = "offline"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(fields))
    save_file(packed, target / "model.safetensors", {"format": "pt"})


def test_a_packed_bitnet_is_read_as_it_lies_and_written_back(tmp_path, bitnet):
    adjust = functools.partial(rounded, bitnet)
    hf_models.build(transformers.BitNetConfig(**TINY), tmp_path / "latent", adjust)
    pack(bitnet, tmp_path / "latent", tmp_path / "packed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", attn_implementation="eager", dtype=torch.float32
    )
    model = seqlab.load(tmp_path / "packed")
    assert parameters(model)["blocks.0.mixer.q.codes"].dtype == jnp.uint8
    tokens = np.random.default_rng(0).integers(0, 97, (hf_models.B, hf_models.T), np.int32)
    expected = hf_models.torch_logits(theirs.eval(), tokens)
    assert_same_rounded_logits(hf_models.logits(model, tokens), expected)
    seqlab.export_hf(model, tmp_path / "exported")
    assert bits(tensors.read(tmp_path / "exported")) == bits(tensors.read(tmp_path / "packed"))


@pytest.mark.parametrize(
    "changed, message",
    [({"linear_class": "bitlinear"}, "'bitlinear'.*offline"), ({"quant_method": "gptq"}, "gptq")],
)
def test_a_bitnet_that_is_packed_in_another_way_is_refused(changed, message, tmp_path):
    method = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    quantized = method | {"quantization_mode": "offline"} | changed
    fields = CONFIG | {"model_type": "bitnet", "quantization_config": quantized}
    with pytest.raises(ModelError, match=message):
        seqlab.load(write(tmp_path / "packed", fields))
