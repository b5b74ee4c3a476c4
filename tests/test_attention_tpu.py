"""Softmax attention as TPU kernels: interpreted against its definition, and compiled for TPUs."""

import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.experimental.pallas import tpu as pltpu

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ModelError
from seqlab.kernels.attention import (
    EMPTY,
    attention,
    attention_with_lse,
    definition,
    pallas_tpu,
    xla,
)
from seqlab.kernels.attention.here import pull_on_tpu, see_on_tpu
from seqlab.plan import topology
from tests.test_attention import with_gradients

B, BLOCK = 2, (256, 128)


def tokens(T, before, H, G, K=32, V=16, dtype: Any = np.float64):
    """Documents in order, of which the first began in the `before` keys that a state holds, and
    padding in one row: blocks of which everything is seen, something and nothing."""
    r, S = np.random.default_rng(0), before + T
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V)
    qkv = [r.normal(size=shape).astype(dtype) for shape in shapes]
    position, document = np.tile(np.arange(S), (B, 1)), np.zeros((B, S), int)
    position[0, before + 60 :], document[0, before + 60 :] = np.arange(T - 60), 1
    document[1, :before], document[1, -5:] = -1, -1
    at = [a.astype(np.int32) for a in (position, document)]
    return qkv, [*(a[:, before:] for a in at), *at]


def compare(qkv, at, interpret, **options):
    options = {"window": None, "sinks": 0, "scale": 0.3, **options}
    run = functools.partial(pallas_tpu.kernel, block=BLOCK, interpret=interpret)
    actual = with_gradients(run, qkv, at, options)
    wide = [a.astype(np.promote_types(a.dtype, np.float32)) for a in qkv]
    expected = with_gradients(definition, wide, at, options)
    assert (expected[0][1] < EMPTY / 2).any()
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)


def test_the_kernels_equal_the_definition():
    with jax.enable_x64(True):
        compare(*tokens(300, 0, H=2, G=1), interpret=True)


def test_with_window_sinks_cap_and_keys_in_groups_too(monkeypatch):
    """Of five blocks of keys, two are in the vector memory at a time."""
    monkeypatch.setattr(pallas_tpu, "VMEM", 2 * 2 * 128 * (32 + 16) * 5 * 8)
    with jax.enable_x64(True):
        qkv, at = tokens(400, 135, H=1, G=1)
        compare(qkv, at, interpret=True, window=140, sinks=3, cap=1.5)


def test_what_was_seen_before_is_not_forgotten():
    """As on a device that meets the keys of others, one after the other."""
    options = xla.Options(window=100, sinks=3, scale=0.3)
    form = pallas_tpu.OnTPU(options, interpret=True)

    def both(see: Any, pull: Any, qkv, at):
        (q, k, v), (q_position, q_document, *k_at) = qkv, at
        queries, keys = xla.in_rows((q, q_position, q_document), 1, 128), (k, v, *k_at)
        first, second = (
            xla.in_columns(tuple(part), 128) for part in zip(*map(halves, keys), strict=True)
        )
        seen = xla.see(options, queries, first, xla.nothing_seen(queries.q, first.v))
        y, lse = xla.answer(see(queries, second, seen), q.dtype)
        done = xla.answered(queries, y, lse, jnp.cos(y), jnp.sin(lse))
        before = xla.pull(options, done, second, xla.zero_gradients(queries.q, second))
        return y, lse, pull(done, second, before)

    bound = lambda *fs, first: [functools.partial(f, first) for f in fs]
    in_xla = functools.partial(both, *bound(xla.see, xla.pull, first=options))
    on_tpu = functools.partial(both, *bound(see_on_tpu, pull_on_tpu, first=form))
    halves = lambda a: jnp.split(a, 2, 1)
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, tokens(128, 128, H=1, G=1, K=16))
        actual, expected = jax.jit(on_tpu)(*given), jax.jit(in_xla)(*given)
        assert_close(actual, expected)


def test_the_kernels_read_nothing_that_nobody_wrote():
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    compare(*tokens(128, 40, H=2, G=1, K=16, dtype=jnp.bfloat16), interpret)


def test_what_the_kernels_cannot_do_xla_does():
    qkv, at = jax.tree.map(jnp.asarray, tokens(100, 20, H=1, G=1, dtype=np.float32))
    expected = attention_with_lse(*qkv, *at, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, attention_with_lse(*qkv, *at), expected)
    with pytest.raises(ModelError, match="whole blocks of 128 tokens, not float32"):
        attention(*qkv, *at, implementation="pallas_tpu")


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
def test_on_a_mesh_of_tpus_both_passes_are_kernels():
    mesh = topology.parse("v5e:2x2").mesh(2, 1, 2)
    split = lambda *axes: jax.NamedSharding(mesh, P(*axes))
    heads, alone = split("data", None, "model"), split("data")
    shape = lambda *s, dtype, on: jax.ShapeDtypeStruct(s, dtype, sharding=on)
    q, k = (shape(B, 1024, n, 64, dtype=jnp.bfloat16, on=heads) for n in (4, 2))
    held = shape(B, 300, 2, 64, dtype=jnp.float32, on=heads)
    at, held_at = (shape(B, n, dtype=jnp.int32, on=alone) for n in (1024, 300))

    def loss(qkv, at, past):
        y, lse = attention_with_lse(*qkv, *at, *at, past=past, window=300)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(lse)

    with jax.set_mesh(mesh):
        given = [q, k, k], [at, at], [held, held, held_at, held_at]
        text = str(jax.jit(jax.grad(loss)).lower(*given).compile().as_text())
    kernels = re.findall(r'%(\w+)\S* = .* custom_call_target="tpu_custom_call"', text)
    assert sorted(kernels) == ["attention_backward", "attention_forward"]
