"""The mLSTM's cell and its first block equal their equations; fixed decays are as published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.layers import exponential_memory as cell
from seqlab.layers.mixers import lightning, mlstm_block

B, T, H, K, V = 2, 40, 2, 6, 4


def definition(q, k, v, log_input, log_forget, reset, state, eps):
    """Beck et al. (2024), equations 19 to 27, token by token."""

    def step(carry, token):
        C, n, m = carry
        q, k, v, log_input, log_forget, reset = token
        keep = ~reset[:, None]
        C, n, m = C * keep[..., None, None], n * keep[..., None], jnp.where(keep, m, 0)
        before, m = m, jax.lax.stop_gradient(jnp.maximum(log_forget + m, log_input))
        f, i = jnp.exp(log_forget + before - m), jnp.exp(log_input - m)
        C = f[..., None, None] * C + i[..., None, None] * k[..., None] * v[..., None, :]
        n = f[..., None] * n + i[..., None] * k
        read = q * K**-0.5
        total = jnp.maximum(jnp.abs(jnp.einsum("bhk,bhk->bh", n, read)), jnp.exp(-m)) + eps
        return (C, n, m), jnp.einsum("bhk,bhkv->bhv", read, C) / total[..., None]

    tokens = (q, k, v, log_input, log_forget, reset)
    by_time = jax.tree.map(lambda a: jnp.moveaxis(jnp.asarray(a), 1, 0), tokens)
    carry = (state.memory[..., :-1], state.memory[..., -1], state.m)
    (C, n, m), h = jax.lax.scan(step, carry, by_time)
    return jnp.moveaxis(h, 0, 1), cell.State(jnp.concatenate([C, n[..., None]], -1), m)


@pytest.mark.parametrize("gates", ["usual", "extreme"])
def test_the_cell_equals_its_definition_in_float64(gates):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, B, T, H, K))
    v, reset = rng.normal(size=(B, T, H, V)), rng.random((B, T)) < 0.08
    log_input, log_forget = rng.normal(size=(B, T, H)), -rng.exponential(size=(B, T, H))
    if gates == "extreme":
        log_input = np.where(np.arange(T)[:, None] % 2, 15.0, -30.0) + log_input
        log_forget = np.where(rng.random((B, T, H)) < 0.2, -30.0, 1e-3 * log_forget)
    state = cell.State(rng.normal(size=(B, H, K, V + 1)), rng.normal(size=(B, H)))
    floats = (q, k, v, log_input, log_forget, state)

    def differentiated(f):
        def loss(floats, reset):
            h, after = f(*floats[:-1], reset, floats[-1])
            return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.sin(after.memory)), (h, after)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    with jax.enable_x64(True):
        fast = lambda *a: cell.exponential_memory(*a, eps=1e-6, chunk_size=16)
        (_, out), gradients = differentiated(fast)(floats, reset)
        slow = lambda *a: definition(*a, eps=1e-6)
        (_, expected), expected_gradients = differentiated(slow)(floats, reset)
        assert_close(out, expected)
        assert_close(gradients[:5], expected_gradients[:5], GRADIENT)


def test_the_first_block_equals_its_equations():
    config = mlstm_block.Config(heads=2, chunk_size=16)
    model = config.build(32, rngs=nnx.Rngs(0))
    noise = iter(jax.random.split(jax.random.key(0), 99))
    model = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(noise), a.shape), model)
    x = np.random.default_rng(0).normal(size=(B, T, 32)).astype(np.float32)
    u, z = np.split(np.asarray(x @ model.up.weight), 2, -1)
    padded = np.pad(u, [(0, 0), (3, 0), (0, 0)])
    c = sum(model.conv.weight[j] * padded[:, j : j + T] for j in range(4)) + model.conv.bias
    c = np.asarray(jax.nn.silu(c))

    def mixed(a, map):
        blocks = a.reshape(B, T, -1, 4)
        return np.einsum("btni,nij->btnj", blocks, map.weight).reshape(B, T, -1)

    q, k, v = mixed(c, model.q), mixed(c, model.k), mixed(u, model.v)
    qkv = np.concatenate([q, k, v], -1)
    i = qkv @ model.i.weight + model.i.bias
    f = jax.nn.log_sigmoid(qkv @ model.f.weight + model.f.bias)
    split = lambda a: a.reshape(B, T, 2, -1)
    q, k, v = split(q), split(k), split(v)
    width = q.shape[-1]
    empty = cell.empty(B, 2, width, width)
    h, _ = definition(q * (K / width) ** 0.5, k, v, i, f, np.zeros((B, T), bool), empty, config.eps)
    h = np.asarray(h) - np.mean(h, -1, keepdims=True)
    h /= np.sqrt(np.mean(h**2, -1, keepdims=True) + config.norm_eps)
    h = h.reshape(B, T, -1) * (1 + model.norm.weight) + model.skip * c
    expected = (h * jax.nn.silu(z)) @ model.down.weight
    assert_close(jax.jit(lambda m, x: m(x)[0])(model, x), expected)


def test_slopes_are_those_of_both_publications():
    linear = lightning.Config(heads=4, slopes="linear", layer=1, layers=4).log_decay()
    np.testing.assert_allclose(linear, [0, -1.5, -3, -4.5])
    geometric = lightning.Config(heads=4, layer=2, layers=5).log_decay()
    less = 1 - 2 / 4.00001 + 1e-5
    np.testing.assert_allclose(geometric, -less * np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]))
