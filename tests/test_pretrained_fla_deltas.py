"""Delta rules and RWKV-7 in fla's layout compute what fla's layers define."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.fla_models import SWIGLU, D, hold, rms, split, swiglu_model, under

H = 4


def delta_rule(q, k, v, beta, log_decay):
    """S = diag(e^g) S; S = S + k (beta (v - S^T k))^T, read with q / sqrt(K): [B, T, H, V]"""
    S = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64)
    q, k, v, beta, decay = (a.double() for a in (q, k, v, beta, log_decay.exp()))
    out = []
    for t in range(q.shape[1]):
        S = decay[:, t, :, :, None] * S
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return (torch.stack(out, 1) * q.shape[-1] ** -0.5).float()


def conv(x, weight):
    """A causal depthwise convolution; weight [C, 1, W]"""
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight, groups=len(weight)).transpose(1, 2)


def projected(w, x, names="qkv"):
    return [
        conv(a, w[f"{n}_conv1d.weight"]) if f"{n}_conv1d.weight" in w else a
        for n, a in ((n, x @ w[f"{n}_proj.weight"].T) for n in names)
    ]


def unit(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def shapes_of(d_k, d_v, *, width=4, **more):
    shapes = {f"*attn.{n}_proj.weight": (d, D) for n, d in zip("qkv", (d_k, d_k, d_v), strict=True)}
    if width:
        shapes |= {
            f"*attn.{n}_conv1d.weight": (d, 1, width)
            for n, d in zip("qkv", (d_k, d_k, d_v), strict=True)
        }
    shapes |= {"*attn.o_proj.weight": (D, d_v)}
    return SWIGLU | shapes | {f"*attn.{name}": shape for name, shape in more.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"allow_neg_eigval": True},
        {"use_gate": True, "qk_activation": "elu", "qk_norm": "sum", "use_beta": False},
        {"use_short_conv": False, "expand_k": 0.5, "qk_activation": "relu"},
    ],
    ids=["short convolution", "gate, sums", "plain"],
)
def test_delta_net_is_that_of_fla(fields, tmp_path):
    gate, beta = fields.get("use_gate", False), fields.get("use_beta", True)
    d_k = int(D * fields.get("expand_k", 1.0))
    activation = {"elu": lambda a: F.elu(a) + 1, "relu": F.relu, "silu": F.silu}
    activation = activation[fields.get("qk_activation", "silu")]

    def mixer(w, x, n):
        q, k, v = projected(w, x)
        q, k = (split(activation(a), H) for a in (q, k))
        if fields.get("qk_norm") == "sum":
            q, k = (a / a.sum(-1, keepdim=True) for a in (q, k))
        else:
            q, k = unit(q), unit(k)
        v = split(F.silu(v), H)
        b = torch.sigmoid(x @ w["b_proj.weight"].T) if beta else torch.ones(*x.shape[:2], H)
        b = b * (2 if fields.get("allow_neg_eigval") else 1)
        o = rms(delta_rule(q, k, v, b, torch.zeros_like(k)), w["o_norm.weight"])
        if gate:
            o = o * F.silu(split(x @ w["g_proj.weight"].T, H))
        return o.flatten(-2) @ w["o_proj.weight"].T

    shapes = shapes_of(d_k, D, width=4 if fields.get("use_short_conv", True) else 0)
    shapes |= {"*attn.o_norm.weight": (D // H,)}
    shapes |= {"*attn.b_proj.weight": (H, D)} if beta else {}
    shapes |= {"*attn.g_proj.weight": (D, D)} if gate else {}
    fields = {"model_type": "delta_net", "num_heads": H} | fields
    hold(tmp_path, fields, shapes, lambda w, t: swiglu_model(w, t, mixer))


@pytest.mark.parametrize("gate, values", [(True, 4), (False, 2)])
def test_gated_delta_net_is_that_of_fla(gate, values, tmp_path):
    heads, head_dim = 2, 8
    d_k, d_v = heads * head_dim, values * 2 * head_dim

    def mixer(w, x, n):
        q, k, v = (F.silu(a) for a in projected(w, x))
        q, k = (unit(split(a, heads)).repeat_interleave(values // heads, 2) for a in (q, k))
        b = torch.sigmoid(x @ w["b_proj.weight"].T)
        g = -w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
        o = delta_rule(q, k, split(v, values), b, g[..., None].expand(k.shape))
        o = rms(o, w["o_norm.weight"])
        if gate:
            o = o * F.silu(split(x @ w["g_proj.weight"].T, values))
        return o.flatten(-2) @ w["o_proj.weight"].T

    more = {"a_proj.weight": (values, D), "b_proj.weight": (values, D), "A_log": (values,)}
    more |= {"dt_bias": (values,), "o_norm.weight": (2 * head_dim,)}
    more |= {"g_proj.weight": (d_v, D)} if gate else {}
    fields = {"model_type": "gated_deltanet", "num_heads": heads, "head_dim": head_dim}
    fields |= {"num_v_heads": values, "use_gate": gate}
    shapes = shapes_of(d_k, d_v, **more)
    hold(tmp_path, fields, shapes, lambda w, t: swiglu_model(w, t, mixer))


@pytest.mark.parametrize("lowest", [None, -5.0])
def test_kda_is_that_of_fla(lowest, tmp_path):
    d = D // H

    def mixer(w, x, n):
        q, k, v = (split(F.silu(a), H) for a in projected(w, x))
        b = torch.sigmoid(x @ w["b_proj.weight"].T)
        dt = split(x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"], H)
        A = w["A_log"].exp()[:, None]
        g = -A * F.softplus(dt) if lowest is None else lowest * torch.sigmoid(A * dt)
        o = rms(delta_rule(unit(q), unit(k), v, b, g), w["o_norm.weight"])
        gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
        return (o * torch.sigmoid(split(gate, H))).flatten(-2) @ w["o_proj.weight"].T

    more = {"b_proj.weight": (H, D), "A_log": (H,), "dt_bias": (D,), "o_norm.weight": (d,)}
    more |= {f"{n}_proj.0.weight": (d, D) for n in "fg"}
    more |= {f"{n}_proj.1.weight": (D, d) for n in "fg"} | {"g_proj.1.bias": (D,)}
    fields = {"model_type": "kda", "num_heads": H, "head_dim": d}
    fields |= {} if lowest is None else {"safe_gate": True, "lower_bound": lowest}
    shapes = shapes_of(D, D, **more)
    hold(tmp_path, fields, shapes, lambda w, t: swiglu_model(w, t, mixer))


@pytest.mark.parametrize(
    "fields",
    [{"shared_mem": True}, {"shared_mem": False, "single_kv_proj": True, "use_output_gate": False}],
    ids=["published", "one projection"],
)
def test_mom_is_that_of_fla(fields, tmp_path):
    """As it decodes: in training, its convolution reads tokens of other memories."""
    heads, d, memories = 2, 8, 3
    single, gate = fields.get("single_kv_proj", False), fields.get("use_output_gate", True)

    def one(w, x, name):
        """A memory's own tokens [n, D] -> [n, H, d]"""
        maps = w["q_proj.weight"], w[name("k")], w[name("v")]
        q, k, v = (
            split(F.silu(conv(x[None] @ a.T, w[f"{n}_conv1d.weight"])), heads)
            for n, a in zip("qkv", maps, strict=True)
        )
        b = torch.sigmoid(x[None] @ w[name("b")].T)
        g = -w["A_log"].exp() * F.softplus(x[None] @ w[name("a")].T + w["dt_bias"])
        return delta_rule(unit(q), unit(k), v, b, g[..., None].expand(k.shape))[0]

    def mixer(w, x, n):
        share, chosen = torch.softmax(x @ w["gate.weight"].T, -1).topk(2)
        share = share / share.sum(-1, keepdim=True)
        shared = lambda n: f"shared_{n}.weight"
        o = torch.zeros(*x.shape[:2], heads, d)
        for row, m in np.ndindex(len(x), memories):
            at, which = (chosen[row] == m).nonzero(as_tuple=True)
            own = shared if single else (lambda n, m=m: f"{n}_proj.{m}.weight")
            o[row, at] += share[row, at, which, None, None] * one(w, x[row, at], own)
        if fields["shared_mem"]:
            o += torch.stack([one(w, row, shared) for row in x])
        o = rms(o, w["o_norm.weight"])
        if gate:
            o = o * F.silu(split(x @ w["g_proj.weight"].T, heads))
        return o.flatten(-2) @ w["o_proj.weight"].T

    each = {"k": heads * d, "v": heads * d, "b": heads, "a": heads}
    names = [] if single else [f"{{}}_proj.{m}.weight" for m in range(memories)]
    names += ["shared_{}.weight"] if single or fields["shared_mem"] else []
    more = {name.format(n): (size, D) for n, size in each.items() for name in names}
    more |= {"gate.weight": (memories, D), "A_log": (heads,), "dt_bias": (heads,)}
    more |= {"o_norm.weight": (d,)} | ({"g_proj.weight": (heads * d, D)} if gate else {})
    shapes = shapes_of(heads * d, heads * d, **more)
    for name in ("*attn.k_proj.weight", "*attn.v_proj.weight"):
        del shapes[name]
    fields = {"model_type": "mom", "num_heads": heads, "head_dim": d} | fields
    fields |= {"num_memories": memories, "topk": 2}
    hold(tmp_path, fields, shapes, lambda w, t: swiglu_model(w, t, mixer))


def rwkv7_shapes(layers, inner):
    vectors = [
        f"{norm}.{part}" for norm in ("attn_norm", "ffn_norm") for part in ("weight", "bias")
    ]
    vectors += ["attn.k_k", "attn.k_a", "attn.g_norm.weight", "attn.g_norm.bias", "ffn.x_k"]
    vectors += ["attn.w_lora.lora.2.bias", "attn.a_lora.lora.2.bias"]
    shapes = {f"*{name}": (D,) for name in vectors}
    shapes |= {f"*attn.x_{n}": (1, 1, D) for n in "rwkvag"} | {"*attn.r_k": (H, D // H)}
    shapes |= {f"*attn.{n}_proj.weight": (D, D) for n in "rkvo"}
    for n, rank in zip("wag", (5, 6, 7), strict=True):
        shapes |= {f"*attn.{n}_lora.lora.0.weight": (rank, D)}
        shapes |= {f"*attn.{n}_lora.lora.2.weight": (D, rank)}
    for n in range(1, layers):
        lora = f"model.layers.{n}.attn.v_lora.lora"
        shapes |= {f"{lora}.0.weight": (4, D), f"{lora}.2.weight": (D, 4), f"{lora}.2.bias": (D,)}
    shapes |= {"*ffn.key.weight": (inner, D), "*ffn.value.weight": (D, inner)}
    ends = [f"{name}.{n}" for name in ("layers.0.pre_norm", "norm") for n in ("weight", "bias")]
    return shapes | {f"model.{name}": (D,) for name in ends}


def test_rwkv7_is_that_of_fla(tmp_path):
    layers = 3
    norm = lambda x, w: F.layer_norm(x, (D,), w["weight"], w["bias"], 1e-5)
    delta = lambda x: F.pad(x, (0, 0, 1, -1)) - x

    def lora(w, name, x, act):
        w = under(w, f"{name}_lora.lora.")
        return act(x @ w["0.weight"].T) @ w["2.weight"].T + w.get("2.bias", 0)

    def memory(r, k, v, w, a, b):
        S = torch.zeros(*r.shape[:1], *r.shape[2:], v.shape[-1], dtype=torch.float64)
        r, k, v, decay, a, b = (x.double() for x in (r, k, v, w.exp(), a, b))
        out = []
        for t in range(r.shape[1]):
            read = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
            S = decay[:, t, :, :, None] * S + b[:, t, :, :, None] * read[:, :, None]
            S = S + k[:, t, :, :, None] * v[:, t, :, None]
            out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
        return torch.stack(out, 1).float()

    def time_mix(w, x, first):
        d = delta(x)
        seen = {n: x + d * w[f"x_{n}"] for n in "rwkvag"}
        r, k, v = (seen[n] @ w[f"{n}_proj.weight"].T for n in "rkv")
        if first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(lora(w, "v", seen["v"], lambda a: a))
        decay = -0.6065306597126334 * torch.sigmoid(lora(w, "w", seen["w"], torch.tanh))
        a = torch.sigmoid(lora(w, "a", seen["a"], lambda a: a))
        kk = F.normalize(split(k * w["k_k"], H), dim=-1)
        k = split(k * (1 + (a - 1) * w["k_a"]), H)
        r, v, a = split(r, H), split(v, H), split(a, H)
        o = memory(r, k, v, split(decay, H), -kk, kk * a).flatten(2)
        eps = D // H * 1e-5
        o = F.group_norm(o.reshape(-1, D), H, w["g_norm.weight"], w["g_norm.bias"], eps)
        o = o.view(x.shape) + ((r * k * w["r_k"]).sum(-1, keepdim=True) * v).flatten(2)
        return (o * lora(w, "g", seen["g"], torch.sigmoid)) @ w["o_proj.weight"].T, first

    def model(weights, tokens):
        x, first = weights["model.embeddings.weight"][tokens], None
        x = norm(x, under(weights, "model.layers.0.pre_norm."))
        for n in range(layers):
            w = under(weights, f"model.layers.{n}.")
            y, first = time_mix(under(w, "attn."), norm(x, under(w, "attn_norm.")), first)
            x = x + y
            y, w = norm(x, under(w, "ffn_norm.")), under(w, "ffn.")
            h = F.relu((y + delta(y) * w["x_k"]) @ w["key.weight"].T) ** 2
            x = x + h @ w["value.weight"].T
        return norm(x, under(weights, "model.norm.")) @ weights["lm_head.weight"].T

    fields = {"model_type": "rwkv7", "head_dim": D // H}
    hold(tmp_path, fields, rwkv7_shapes(layers, 64), model, layers)
