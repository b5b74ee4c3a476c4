"""Mixers over elementwise scans, against the equations of their papers, token by token in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import assert_close
from seqlab.kernels.precision import bounded_sqrt
from seqlab.layers.mixers.s5 import hippo
from seqlab.layers.registry import mixer_config

B, T, D = 2, 9, 16


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def positive(x):
    return np.where(x >= 0, x + 0.5, sigmoid(x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def built(name, **fields):
    """A mixer, its weights by name in float64, its input, and what it returns."""
    mixer = jax.jit(lambda: mixer_config(name, **fields).build(D, rngs=nnx.Rngs(0)))()
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    paths, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(mixer, nnx.Param)))
    weights = {
        ".".join(str(key.key) for key in path): np.asarray(leaf, np.float64) for path, leaf in paths
    }
    return weights, np.asarray(x, np.float64), jax.jit(lambda mixer, x: mixer(x)[0])(mixer, x)


def scanned(decay, write):
    """h_t = decay_t h_{t-1} + write_t from zero, [B, T, E]"""
    h, states = np.zeros_like(write[:, 0]), []
    for t in range(T):
        h = decay[:, t] * h + write[:, t]
        states.append(h)
    return np.stack(states, 1)


def test_min_gru_is_its_equations():
    w, x, y = built("min_gru", expand=2.0)
    z, new = sigmoid(x @ w["gate.weight"]), positive(x @ w["candidate.weight"])
    assert_close(y, scanned(1 - z, z * new) @ w["out.weight"])


def test_min_lstm_is_its_equations():
    w, x, y = built("min_lstm", positive=False)
    f, i = sigmoid(x @ w["forget.weight"]), sigmoid(x @ w["input.weight"])
    assert_close(y, scanned(f / (f + i), i / (f + i) * (x @ w["candidate.weight"])))


def test_aaren_is_softmax_attention_of_its_query():
    w, x, y = built("aaren", heads=2)
    split = lambda name: (x @ w[f"{name}.weight"]).reshape(B, T, 2, -1)
    k, v = split("k"), split("v")
    e = np.exp(np.einsum("bthk,hk->bth", k, w["query"]) * k.shape[-1] ** -0.5)
    read = [np.einsum("bth,bthv->bhv", e[:, :n], v[:, :n]) for n in range(1, T + 1)]
    total = [np.sum(e[:, :n], 1)[..., None] for n in range(1, T + 1)]
    expected = np.stack([a / b for a, b in zip(read, total, strict=True)], 1).reshape(B, T, D)
    assert_close(y, expected @ w["out.weight"])


@pytest.mark.parametrize("activation", ["full_glu", "half_glu1", "half_glu2", "gelu"])
def test_s5_is_its_equations(activation):
    w, x, y = built("s5", d_state=8, activation=activation)
    eigenvalues, dt = w["real"] + 1j * w["imag"], np.exp(w["log_dt"])
    decay = np.exp(eigenvalues * dt)
    into = (w["b_real"] + 1j * w["b_imag"]) * (decay - 1) / eigenvalues
    write = x @ into
    h = scanned(np.broadcast_to(decay, write.shape), write)
    s = 2 * (h @ (w["c_real"] + 1j * w["c_imag"])).real + w["D"] * x
    a = gelu(s)
    gate = lambda: sigmoid(a @ w["gate.weight"] + w["gate.bias"])
    expected = {
        "full_glu": lambda: (a @ w["value.weight"] + w["value.bias"]) * gate(),
        "half_glu1": lambda: a * gate(),
        "half_glu2": lambda: s * gate(),
        "gelu": lambda: a,
    }
    assert_close(y, expected[activation]())


def test_s5_starts_as_hippo():
    eigenvalues, vectors = hippo(16)
    n = np.arange(16)
    legs = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1)
    normal = legs + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5))
    np.testing.assert_allclose(normal @ vectors, vectors * eigenvalues, atol=1e-12)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(8), atol=1e-12)


def test_the_root_of_the_rg_lru_has_a_bounded_slope():
    slope = jax.grad(bounded_sqrt)
    np.testing.assert_allclose([slope(0.0), slope(1e-12), slope(0.25)], [1000, 1000, 1], rtol=1e-6)


def test_mamba_starts_as_published():
    mixer = mixer_config("mamba", d_state=4).build(D, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(jnp.exp(mixer.A_log[...]), np.tile([1, 2, 3, 4], (2 * D, 1)), 1e-6)
    dt = jax.nn.softplus(mixer.dt_bias[...])
    assert (dt > 0.99e-3).all() and (dt < 0.101).all() and dt.max() > 4 * dt.min()
