"""Softmax attention while the mesh splits time: every method equals one device, and what travels
is what it says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError
from seqlab.kernels.attention import EMPTY, attention_with_lse, xla, zigzag
from seqlab.kernels.attention.visible import visible_blocks
from seqlab.parallel.mesh import ATTENTIONS, use_mesh

B, T, H, G, K, V, SLOTS = 2, 32, 8, 2, 4, 3, 6
CUBE = {"data": 2, "seq": 2, "model": 2}
CAUSAL, WINDOW = {}, {"window": 7, "sinks": 2}
BOTH, NEAR = {"causal": False}, {"causal": False, "window": 5, "cap": 1.5}


@functools.cache
def inputs():
    """q, k, v and past keys and values; their places. One document spans all shards but the end of
    the last, the others lie five in a shard or across borders; some queries are padding."""
    r = np.random.default_rng(0)
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, V), (B, SLOTS, G, K), (B, SLOTS, G, V)]
    document, position = np.zeros((B, T), np.int32), np.tile(np.arange(4, T + 4), (B, 1))
    for row, start in [(0, 29), *((1, t) for t in (1, 2, 3, 6, 14))]:
        document[row, start:] += 1
        position[row, start:] = np.arange(T - start)
    document[1, -3:] = -1
    held = np.tile(np.array([0, 1, 2, 3, -1, -1], np.int32), (B, 1))
    at = position.astype(np.int32), document, held, np.where(held < 0, -1, 0).astype(np.int32)
    return [r.normal(size=shape) for shape in shapes], at


def outputs(options, q, k, v, past_k, past_v):
    *at, held, held_document = inputs()[1]
    past = past_k, past_v, held, held_document
    return attention_with_lse(q, k, v, *at, *at, past=past, **options)


def with_gradients(options, arrays):
    (y, lse), pull = jax.vjp(functools.partial(outputs, options), *arrays)
    return (y, lse), pull((jnp.cos(y), jnp.where(lse > EMPTY, jnp.sin(lse), 0)))


@functools.cache
def expected(*options):
    options = {**dict(options), "implementation": "reference"}
    return jax.jit(functools.partial(with_gradients, options))(inputs()[0])


def placed(mesh, arrays):
    put = lambda a, time: jax.device_put(a, NamedSharding(mesh, jax.P("data", time, "model")))
    return [put(a, "seq") for a in arrays[:3]] + [put(a, None) for a in arrays[3:]]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "WIDE", (8, 4))
    monkeypatch.setattr(xla, "NARROW", (4, 2))


@pytest.mark.parametrize(
    "method, axes, options",
    [
        ("gather_kv", {"seq": 8}, WINDOW),
        ("gather_kv", CUBE, BOTH),
        ("ring", {"seq": 4}, CAUSAL),
        ("ring", {"seq": 8}, NEAR),
        ("ring", CUBE, WINDOW),
        ("zigzag", {"seq": 4}, WINDOW),
        ("zigzag", CUBE, CAUSAL),
        ("token_ring", {"seq": 4}, CAUSAL),
        ("token_ring", CUBE, NEAR),
        ("ulysses", {"seq": 8}, WINDOW),
        ("ulysses", CUBE, CAUSAL),
        ("rsa", {"seq": 4}, NEAR),
        ("rsa", CUBE, BOTH),
        ("ring", {"data": 2, "model": 2}, WINDOW),  # time is whole
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_one_device(small_blocks, method, axes, options):
    with jax.enable_x64(True):
        want = expected(*options.items())
        with use_mesh(**axes, attention=method) as mesh:
            run = jax.jit(lambda arrays: with_gradients(options, arrays))
            got = run(placed(mesh, inputs()[0]))
        assert_close(got[0], want[0])
        assert_close(got[1], want[1], GRADIENT)
        (y, lse), _ = jax.tree.map(np.asarray, got)
        assert (y[1, -3:] == 0).all() and (lse[1, -3:] == EMPTY).all()


def travels(program: str) -> dict[str, int]:
    """Bytes that arrive by each kind of collective, those in a loop as often as it turns."""
    bodies = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.S | re.M))
    (entry,) = re.findall(r"^ENTRY .*?\{\n(.*?)^\}", program, re.S | re.M)
    found: dict[str, int] = {}

    def walk(body, times):
        for line in body.splitlines():
            if loop := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                walk(bodies[loop[1]], times * int(turns[1]) if turns else math.nan)
            elif moved := re.search(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)\(", line):
                arrays = re.findall(r"[sf](\d+)\[([\d,]*)\]", moved[1])
                size = sum(int(bits) // 8 * math.prod(map(int, n.split(","))) for bits, n in arrays)
                found[moved[2]] = found.get(moved[2], 0) + times * size

    walk(entry, 1)
    return found


@pytest.mark.parametrize("size", [2, 8])
def test_bytes_are_those_of_keys_values_and_their_places(size):
    """Gathered once, or passed on P - 1 times; back, the sums of their gradients come home."""
    keys, places = 4 * B * (T // size) * G * (K + V), 4 * B * (T // size) * 2
    arrays = [a.astype(np.float32) for a in inputs()[0][:3]]
    at = inputs()[1][:2] * 2

    def compiled(method, run):
        with use_mesh(seq=size, attention=method) as mesh:
            put = lambda a: jax.device_put(a, NamedSharding(mesh, jax.P(None, "seq")))
            given = [put(a) for a in (*arrays, *at)]
            return travels(jax.jit(lambda *a: run(*a)).lower(*given).compile().as_text())

    def gradients(q, k, v, *at):
        y, pull = jax.vjp(lambda q, k, v: attention_with_lse(q, k, v, *at)[0], q, k, v)
        return pull(y)

    everyone = size * (keys + places)
    assert compiled("gather_kv", attention_with_lse) == {"all-gather": everyone}
    hops = (size - 1) * (keys + places)
    assert compiled("ring", attention_with_lse) == {"collective-permute": hops}
    back = compiled("gather_kv", gradients)  # keys are gathered again, not so their places
    assert back == {"all-gather": everyone + size * keys, "reduce-scatter": keys}
    if size > 2:  # of two devices, XLA keeps what came with the one hop forward
        assert compiled("ring", gradients) == {"collective-permute": 2 * hops + size * keys}


def test_zigzag_gives_every_device_the_same_to_do_at_every_step():
    size, pieces = 4, 8
    with use_mesh(seq=size):
        split = functools.partial(jax.shard_map, in_specs=jax.P(None, "seq"))
        position = jnp.arange(64, dtype=jnp.int32)[None]
        dealt = split(lambda a: jnp.concatenate(zigzag.deal(a), 1), out_specs=jax.P(None, "seq"))
        there = jax.jit(dealt)(position)
        again = split(lambda a: zigzag.collect(*zigzag.deal(a)), out_specs=jax.P(None, "seq"))
        assert (jax.jit(again)(position) == position).all()

    def work(position):
        at = jnp.stack([position, position * 0]).reshape(2, pieces, 1, -1)
        some, _ = visible_blocks(at, at, None, 0)
        some = np.asarray(some).reshape(size, 2, size, 2).sum((1, 3))
        return [[some[r, (r - step) % size] for r in range(size)] for step in range(1, size)]

    assert work(there) == [[2] * size] * (size - 1)
    assert work(position) != work(there)


def test_a_mixer_in_training_gathers_no_keys():
    from flax import nnx

    from seqlab.layers.registry import mixer_config

    mixer = mixer_config("attention", heads=4, head_dim=8, max_length=64).build(8, rngs=nnx.Rngs(0))
    with use_mesh(seq=4, attention="ring") as mesh:
        x = jax.device_put(jnp.ones((2, 64, 8)), NamedSharding(mesh, jax.P(None, "seq")))
        loss = lambda mixer, x: jnp.sum(mixer(x)[0] ** 2)
        program = jax.jit(jax.grad(loss)).lower(mixer, x).compile().as_text()
    one = 4 * 2 * 64 * 4 * 8  # the keys of all devices
    assert travels(program).get("all-gather", 0) < one / 8


def test_heads_that_ulysses_cannot_split_are_refused():
    arrays, at = inputs()
    q, k, v = (a[:, :, :2] for a in arrays[:3])
    with (
        use_mesh(seq=4, attention="ulysses"),
        pytest.raises(ConfigError, match="cannot split 2 heads .* over seq=4: make heads a multip"),
    ):
        attention_with_lse(q, k, v, *at[:2], *at[:2])


def test_every_name_is_tried_here():
    assert set(ATTENTIONS) == {"gather_kv", "ring", "zigzag", "token_ring", "ulysses", "rsa"}
