"""Tiny random models in the layout of flash-linear-attention, computed by plain torch loops.

fla's own modules need a GPU, so its layers are written out here, one token at a time; each layer is
a function of the weights under its prefix. `hold` is what every such family must hold.
"""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import seqlab
from seqlab.conformance.tolerance import assert_same_logits
from seqlab.models import tensors
from seqlab.models.parameters import parameters
from tests.hf_models import B, T, bits, logits

VOCAB, D, LAYERS, INNER = 97, 32, 3, 48


def hold(
    folder: pathlib.Path,
    fields: dict,
    shapes: dict,
    forward: Callable,
    layers: int = LAYERS,
    same: Callable = assert_same_logits,
) -> seqlab.LM:
    """Logits equal those of `forward(weights, tokens)`; files and weights survive export.

    shapes  of every tensor by name; a name that starts with "*" is one in every layer
    same    says what equal logits are
    """
    weights = random_weights(shapes, layers)
    fields = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": layers} | fields
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "model.safetensors")
    ours = seqlab.load(folder)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (B, T), np.int32)
    with torch.no_grad():
        expected = forward(weights, torch.tensor(tokens, dtype=torch.long)).numpy()
    assert 2 < np.abs(expected).max() < 60, "adjust the weights: logits are to be of size ten"
    same(logits(ours, tokens), expected)
    seqlab.export_hf(ours, folder / "exported")
    assert bits(tensors.read(folder / "exported")) == bits(tensors.read(folder))
    assert bits(parameters(seqlab.load(folder / "exported"))) == bits(parameters(ours))
    return ours


def random_weights(shapes: dict, layers: int) -> dict[str, torch.Tensor]:
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        for n in range(layers) if name.startswith("*") else [None]:
            full = name if n is None else f"model.layers.{n}.{name[1:]}"
            noise = torch.randn(shape, generator=generator)
            vector = len(shape) == 1 or name.endswith(("x_bias", "bonus", "lower_bounds"))
            one = full.endswith("norm.weight") or "norm_swish_gate" in full
            weights[full] = one + 0.3 * noise if vector else noise * shape[-1] ** -0.5
    weights["model.embeddings.weight"] = torch.randn((VOCAB, D), generator=generator)
    weights["lm_head.weight"] = torch.randn((VOCAB, D), generator=generator)
    return weights


def under(weights: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def rms(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu_model(weights, tokens, mixer: Callable, layers: int = LAYERS):
    """The decoder that most families share; mixer(weights of its layer, x, n) -> y"""
    x = weights["model.embeddings.weight"][tokens]
    for n in range(layers):
        w = under(weights, f"model.layers.{n}.")
        x = x + mixer(under(w, "attn."), rms(x, w["attn_norm.weight"]), n)
        y = rms(x, w["mlp_norm.weight"])
        h = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + h @ w["mlp.down_proj.weight"].T
    return rms(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


SWIGLU = {
    "*attn_norm.weight": (D,),
    "*mlp_norm.weight": (D,),
    "*mlp.gate_proj.weight": (INNER, D),
    "*mlp.up_proj.weight": (INNER, D),
    "*mlp.down_proj.weight": (D, INNER),
    "model.norm.weight": (D,),
}


def memory(q, k, v, log_decay, bonus=None):
    """S = diag(e^g) S + k v^T read with q, after the write; or before it, with a bonus.

    q, k, log_decay [B, T, H, K], v [B, T, H, V] -> [B, T, H, V]
    """
    S = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64)
    q, k, v, decay = (a.double() for a in (q, k, v, log_decay.exp()))
    out = []
    for t in range(q.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None]
        before, S = S, decay[:, t, :, :, None] * S + written
        read = S if bonus is None else before + bonus.double()[..., None] * written
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], read))
    return torch.stack(out, 1).float()


def split(x, n):
    """[B, T, n d] -> [B, T, n, d]"""
    return x.unflatten(-1, (n, -1))
