"""What papers on linearization define, in numpy and float64, token by token: one document x [n, D]
of a mixer with TEACHER's projections -> what its heads say [n, H, K]."""

from typing import Any, NamedTuple

import numpy as np

H, G, K, W = 4, 2, 8, 5  # query heads, key heads, their width; the window
SCALE = 0.5


class Document(NamedTuple):
    """What the equations speak of, [n, H, K] each but x [n, D]: R(a) is a, rotated."""

    mixer: Any
    x: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    gate: np.ndarray  # keys before they are normed
    Rq: np.ndarray
    Rk: np.ndarray


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def softmax(a):
    return np.exp(a) / np.exp(a).sum(-1, keepdims=True)


def rotated(a):
    """The channels i and i + K/2 as a complex number, turned by t * 10,000^(-2i/K)."""
    t = np.arange(len(a))[:, None, None]
    z = (a[..., : K // 2] + 1j * a[..., K // 2 :]) * np.exp(
        1j * t * 1e4 ** (-np.arange(K // 2) * 2 / K)
    )
    return np.concatenate([z.real, z.imag], -1)


def document(mixer, x) -> Document:
    split = lambda layer: (x @ f8(layer.weight) + f8(layer.bias)).reshape(len(x), -1, K)
    rms = lambda a, w: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * f8(w.weight)
    every = lambda a: np.repeat(a, H // G, 1)
    q, k = rms(split(mixer.q), mixer.q_norm), every(rms(split(mixer.k), mixer.k_norm))
    gate, v = every(split(mixer.k)), every(split(mixer.v))
    return Document(mixer, x, q, k, v, gate, rotated(q), rotated(k))


def f8(parameter):
    return np.asarray(parameter[...], np.float64)


def scores(q, k, t, seen):
    """q_t . k_s of the s that are seen, scaled: [H, s]"""
    return SCALE * np.einsum("hk,shk->hs", q[t], k[seen])


def windowed(q, k, v, seen=lambda t: range(max(0, t - W + 1), t + 1)):
    """softmax(scores) v over what each t sees"""
    return np.stack(
        [
            np.einsum("hs,shk->hk", softmax(scores(q, k, t, [*seen(t)])), v[[*seen(t)]])
            for t in range(len(q))
        ]
    )


def remembered(decay, key, v, query):
    """S_t = diag(decay_t) S_{t-1} + key_t v_t^T, read by query_t: [n, H, V]"""
    S, y = 0.0, []
    for t in range(len(v)):
        S = decay[t][..., None] * S + key[t][..., None] * v[t][:, None]
        y.append(np.einsum("hf,hfv->hv", query[t], S))
    return np.stack(y)


def divided(decay, key, v, query):
    """The same, divided by the sum of its weights."""
    y = remembered(decay, key, np.concatenate([v, np.ones_like(v[..., :1])], -1), query)
    return y[..., :-1] / (y[..., -1:] + 1e-6)


def hedgehog_map(phi, a):
    z = np.einsum("nhd,hdf->nhf", a, f8(phi.project.weight))
    return np.concatenate([softmax(z), softmax(-z)], -1)


def features(d: Document, q, k):
    memory = d.mixer.memory
    return hedgehog_map(memory.feature_map_q, q), hedgehog_map(memory.feature_map_k, k)


def liger(d, a=None, key=None, query=None):
    a = sigmoid(d.gate) ** (1 / 16) if a is None else a
    key, query = softmax(d.k) if key is None else key, softmax(d.q) if query is None else query
    return 0.5 * windowed(d.Rq, d.Rk, d.v) + 0.5 * remembered(a, key, d.v, query)


def liger_hgrn2(d):
    return liger(d, sigmoid(d.gate), 1 - sigmoid(d.gate))


def liger_gsa(d):
    a = sigmoid(d.gate) ** (1 / 16)
    keys, p = 0.0, []
    for t in range(len(a)):
        keys = a[t][..., None] * keys + (1 - a[t])[..., None] * d.k[t][:, None]
        p.append(softmax(np.einsum("hmk,hk->hm", keys, d.q[t])))
    return liger(d, a, 1 - a, np.stack(p))


def liger_mamba2(d):
    softplus = np.log1p(np.exp(d.gate.mean(-1, keepdims=True)))
    return liger(d, np.exp(-softplus))


def lizard(d, q=None, k=None):
    m, (fq, fk) = d.mixer, features(d, d.q, d.k)
    gamma = sigmoid(d.x @ f8(m.memory.decay.weight) + f8(m.memory.decay.bias))[..., None]
    near, (q, k) = [], (d.q, d.k) if q is None else (q, k)
    for t in range(len(q)):
        seen = [*range(max(0, t - W + 1), t + 1)]
        e = np.exp(scores(q, k, t, seen))
        total = np.exp(f8(m.sink)).sum() + e.sum(-1, keepdims=True)
        near.append(np.einsum("hs,shk->hk", e, d.v[seen]) / total)
    return divided(gamma, fk, d.v, fq) + f8(m.alpha) * np.stack(near)


def lizard_rope(d):
    return lizard(d, d.Rq, d.Rk)


def lolcats(d):
    (fq, fk), y = features(d, d.Rq, d.Rk), []
    for t in range(len(d.q)):
        weights = np.einsum("hf,shf->hs", fq[t], fk[: t + 1])
        seen = np.arange(t + 1) > t - W
        e = scores(d.Rq, d.Rk, t, seen.nonzero()[0])
        e = np.exp(e - e.max(-1, keepdims=True))
        weights[:, seen] = sigmoid(f8(d.mixer.window_factor))[:, None] * e
        y.append(np.einsum("hs,shk->hk", weights / weights.sum(-1, keepdims=True), d.v[: t + 1]))
    return np.stack(y)


def hedgehog(d):
    fq, fk = features(d, d.Rq, d.Rk)
    return divided(np.ones_like(fk), fk, d.v, fq)


def t2r(d):
    phi = lambda project, a: np.maximum(
        np.einsum("nhd,hdf->nhf", a, f8(project.weight)) + f8(project.bias), 0
    )
    memory = d.mixer.memory
    fq, fk = phi(memory.feature_map_q.project, d.Rq), phi(memory.feature_map_k.project, d.Rk)
    return divided(np.ones_like(fk), fk, d.v, fq)


def supra(d):
    def phi(project, a):
        over = a.reshape(len(a), -1) @ f8(project.weight) + f8(project.bias)
        return rotated(np.maximum(over, 0).reshape(len(a), -1, K))

    memory = d.mixer.memory
    fq = phi(memory.feature_map_q.project, d.q) * K**-0.5
    fk = np.repeat(phi(memory.feature_map_k.project, d.k[:, :: H // G]), H // G, 1)
    slope = 2.0 ** (-8 * (np.arange(H) + 1) / H)
    y = remembered(np.broadcast_to(np.exp(-slope)[:, None], fk.shape), fk, d.v, fq)
    apart = y - y.mean(-1, keepdims=True)
    return apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-5)


def swa(d):
    return windowed(d.Rq, d.Rk, d.v)


def swa_sink(d):
    return windowed(
        d.Rq, d.Rk, d.v, lambda t: [s for s in range(t + 1) if s < 2 or s > t - (W - 2)]
    )


def one_gate_a_head(d):
    """Liger's form of mLSTM, with gates of normed keys, and first tokens that stay visible."""
    a = sigmoid(d.k.mean(-1, keepdims=True))
    near = windowed(d.Rq, d.Rk, d.v, lambda t: [s for s in range(t + 1) if s < 2 or s > t - W])
    return 0.25 * near + 0.75 * remembered(a, softmax(d.k), d.v, softmax(d.q))


def fixed_rates(d):
    """RetNet's decays, features of one map for queries and keys, and Lizard's scores in LoLCATs'
    softmax."""
    fq, fk = (hedgehog_map(d.mixer.memory.feature_map_q, a) for a in (d.q, d.k))
    a, sink, y = 1 - 2.0 ** (-5 - np.arange(H)), f8(d.mixer.sink), []
    for t in range(len(d.q)):
        seen = [*range(max(0, t - W + 1), t + 1)]
        e = scores(d.q, d.k, t, seen)
        e = np.concatenate([e, np.broadcast_to(sink, (H, len(sink)))], 1)
        e = sigmoid(f8(d.mixer.window_factor))[:, None] * np.exp(e - e.max(-1, keepdims=True))
        far = a[:, None] ** (t - np.arange(t + 1)) * np.einsum("hf,shf->hs", fq[t], fk[: t + 1])
        far *= (2 * K) ** -0.5
        read = np.einsum("hs,shk->hk", far, d.v[: t + 1])
        read += np.einsum("hs,shk->hk", e[:, : len(seen)], d.v[seen])
        y.append(read / (far.sum(-1) + e.sum(-1))[:, None])
    return np.stack(y)
