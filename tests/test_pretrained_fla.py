"""GLA, RetNet, HGRN2 and RWKV-6 in fla's layout compute what fla's layers define."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import seqlab
from seqlab.errors import ModelError
from tests.fla_models import SWIGLU, VOCAB, D, hold, memory, rms, split, swiglu_model, under

H = 4


def conv(x, weight):
    """silu of a causal depthwise convolution; weight [C, 1, W]"""
    width = weight.shape[-1]
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    return F.silu(F.conv1d(padded, weight, groups=len(weight)).transpose(1, 2))


def qkvgo(d_k, d_v, width=0):
    shapes = {
        f"*attn.{n}_proj.weight": (d, D) for n, d in zip("qkvg", (d_k, d_k, d_v, d_v), strict=True)
    }
    if width:
        shapes |= {
            f"*attn.{n}_conv1d.weight": (d, 1, width)
            for n, d in zip("qkv", (d_k, d_k, d_v), strict=True)
        }
    return SWIGLU | shapes | {"*attn.o_proj.weight": (D, d_v)}


def projected(w, x):
    q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
    if "q_conv1d.weight" in w:
        q, k, v = (conv(a, w[f"{n}_conv1d.weight"]) for n, a in zip("qkv", (q, k, v), strict=True))
    q, k, v = (split(a, H) for a in (q, k, v))
    return q * q.shape[-1] ** -0.5, k, v


def gated(w, x, o, name):
    y = rms(o, w[f"{name}.weight"]) * F.silu(split(x @ w["g_proj.weight"].T, H))
    return y.flatten(-2) @ w["o_proj.weight"].T


@pytest.mark.parametrize("width, clamp_min, fused", [(0, None, True), (4, -0.05, False)])
def test_gla_is_that_of_fla(width, clamp_min, fused, tmp_path):
    name = "g_norm_swish_gate" if fused else "g_norm"
    shapes = qkvgo(D // 2, D, width) | {
        "*attn.gk_proj.0.weight": (6, D),
        "*attn.gk_proj.1.weight": (D // 2, 6),
        "*attn.gk_proj.1.bias": (D // 2,),
        f"*attn.{name}.weight": (D // H,),
    }

    def mixer(w, x, n):
        low = x @ w["gk_proj.0.weight"].T
        g = F.logsigmoid(low @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]) / 16
        g = g if clamp_min is None else g.clamp_min(clamp_min)
        return gated(w, x, memory(*projected(w, x), split(g, H)), name)

    fields = {"model_type": "gla", "num_heads": H, "clamp_min": clamp_min, "fuse_norm": fused}
    fields |= {
        "use_short_conv": width > 0,
        "conv_size": 4,
        "feature_map": None,
        "num_kv_heads": None,
    }
    model = hold(tmp_path, fields, shapes, lambda w, t: swiglu_model(w, t, mixer))
    assert len(model.blocks) == 1, "its layers are alike, so one program serves all"


def test_retnet_is_that_of_fla(tmp_path):
    def mixer(w, x, n):
        q, k, v = projected(w, x)
        K = q.shape[-1]
        angle = torch.arange(x.shape[1])[:, None] * 10_000.0 ** (-torch.arange(K // 2) * 2 / K)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def turn(a):
            one, two = a.chunk(2, -1)
            return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

        g = torch.log(1 - 2.0 ** (-5.0 - torch.arange(H)))
        o = memory(turn(q), turn(k), v, g[:, None].expand(k.shape))
        return gated(w, x, o, "g_norm_swish_gate")

    shapes = qkvgo(D, 2 * D) | {"*attn.g_norm_swish_gate.weight": (2 * D // H,)}
    fields = {"model_type": "retnet", "num_heads": H}
    hold(tmp_path, fields, shapes, lambda w, t: swiglu_model(w, t, mixer))


def test_hgrn2_is_that_of_fla_and_its_bounds_stay_one_table(tmp_path):
    def model(weights, tokens):
        bounds = weights["model.lower_bounds"].softmax(0)
        bounds = bounds.cumsum(0) - bounds[0]

        def mixer(w, x, n):
            g = F.logsigmoid(x @ w["f_proj.weight"].T)
            if n:
                g = torch.log(bounds[n] + (1 - bounds[n]) * g.exp())
            q, v = F.silu(x @ w["q_proj.weight"].T) * 8**-0.5, x @ w["i_proj.weight"].T
            o = memory(*(split(a, H) for a in (q, 1 - g.exp(), v, g))).flatten(-2)
            return rms(o, w["g_norm.weight"], 1e-5) @ w["o_proj.weight"].T

        return swiglu_model(weights, tokens, mixer)

    shapes = SWIGLU | {f"*attn.{n}_proj.weight": (D, D) for n in "qfio"}
    shapes |= {"*attn.g_norm.weight": (D,), "model.lower_bounds": (3, D)}
    fields = {"model_type": "hgrn2", "expand_ratio": 8}
    ours = hold(tmp_path, fields, shapes, model)
    bounds = ours.blocks[1].mixer.bounds
    bounds[...] = bounds[...] + 1
    with pytest.raises(ModelError, match="trained apart"):
        seqlab.export_hf(ours, tmp_path / "apart")


def rwkv6_shapes(rank, inner):
    vector = ("attn_norm.weight", "attn_norm.bias", "ffn_norm.weight", "ffn_norm.bias")
    vector += ("attn.x_proj.0.mu", "attn.w_proj.linear.lora.2.bias", "attn.g_norm.weight")
    vector += ("attn.g_norm.bias", "ffn.key.mu", "ffn.receptance.mu")
    shapes = {f"*{name}": (D,) for name in vector}
    shapes |= {f"*attn.{n}_proj.linear.weight": (D, D) for n in "rkvg"}
    shapes |= {f"model.layers.0.pre_norm.{n}": (D,) for n in ("weight", "bias")}
    shapes |= {f"model.norm.{n}": (D,) for n in ("weight", "bias")}
    shapes |= {
        "*attn.x_proj.0.linear.weight": (5 * rank, D),
        "*attn.x_proj.2.weight": (D, 5 * rank),
        "*attn.x_bias": (5, D),
        "*attn.w_proj.linear.lora.0.weight": (7, D),
        "*attn.w_proj.linear.lora.2.weight": (D, 7),
        "*attn.bonus": (H, D // H),
        "*attn.o_proj.weight": (D, D),
        "*ffn.key.linear.weight": (inner, D),
        "*ffn.value.weight": (D, inner),
        "*ffn.receptance.linear.weight": (D, D),
    }
    return shapes


def test_rwkv6_is_that_of_fla(tmp_path):
    rank = 3

    def norm(x, w):
        return F.layer_norm(x, (D,), w["weight"], w["bias"], 1e-5)

    def delta(x):
        return F.pad(x, (0, 0, 1, -1)) - x

    def time_mix(w, x):
        d = delta(x)
        low = torch.tanh((x + d * w["x_proj.0.mu"]) @ w["x_proj.0.linear.weight"].T)
        up = w["x_proj.2.weight"].view(D, 5, rank)
        mix = torch.einsum("btnr,hnr->nbth", split(low, 5), up) + w["x_bias"][:, None, None]
        xr, xw, xk, xv, xg = x + d * mix
        r, k, v = (
            split(a @ w[f"{n}_proj.linear.weight"].T, H)
            for n, a in zip("rkv", (xr, xk, xv), strict=True)
        )
        lora = under(w, "w_proj.linear.lora.")
        decay = torch.tanh(xw @ lora["0.weight"].T) @ lora["2.weight"].T + lora["2.bias"]
        o = memory(r, k, v, split(-decay.exp(), H), w["bonus"]).flatten(2)
        o = F.group_norm(o.reshape(-1, D), H, w["g_norm.weight"], w["g_norm.bias"], 1e-5)
        return (o.view(x.shape) * F.silu(xg @ w["g_proj.linear.weight"].T)) @ w["o_proj.weight"].T

    def channel_mix(w, x):
        d = delta(x)
        k = F.relu((x + d * w["key.mu"]) @ w["key.linear.weight"].T) ** 2
        r = torch.sigmoid((x + d * w["receptance.mu"]) @ w["receptance.linear.weight"].T)
        return r * (k @ w["value.weight"].T)

    def model(weights, tokens):
        x = weights["model.embeddings.weight"][tokens]
        x = norm(x, under(weights, "model.layers.0.pre_norm."))
        for n in range(3):
            w = under(weights, f"model.layers.{n}.")
            x = x + time_mix(under(w, "attn."), norm(x, under(w, "attn_norm.")))
            x = x + channel_mix(under(w, "ffn."), norm(x, under(w, "ffn_norm.")))
        return norm(x, under(weights, "model.norm.")) @ weights["lm_head.weight"].T

    fields = {"model_type": "rwkv6", "num_heads": H, "expand_k": 1.0, "norm_bias": True}
    hold(tmp_path, fields, rwkv6_shapes(rank, 64), model)


def test_what_is_not_known_of_fla_is_refused_by_name(tmp_path):
    fields = {"model_type": "gla", "num_heads": H, "hidden_size": D, "vocab_size": VOCAB}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"feature_map": "relu"}))
    hold_nothing = {"model.embeddings.weight": torch.zeros(VOCAB, D)}
    save_file(hold_nothing, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="feature_map"):
        seqlab.load(tmp_path)
