"""How states travel along `seq`: every way the same numbers as one device, and what it sends."""

import functools
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from seqlab.conformance.tolerance import FORWARD, GRADIENT, assert_close
from seqlab.errors import ConfigError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.linear_scan import Complex, linear_scan
from seqlab.parallel import sequence, use_mesh
from seqlab.parallel.mesh import SEQ, current_travel
from seqlab.parallel.transitions import Diagonal, Matrix, MaxPlus, compose

SHARD = 8  # tokens
K, V = 4, 8
WAYS = {
    "all_gather": {},
    "ring": {},
    "all_scan": {"blocks": 2},
    "doubling": {},
    "window": {},  # with hops enough for any document
    "two_level": {"blocks": 2},
}


def documents(devices):
    """Where documents start, [T, B]: a row for each way that they can lie on shards."""
    starts = (
        [],  # one document, begun before
        [SHARD + 3],  # inside a shard
        [SHARD, 2 * SHARD],  # on borders
        [3, 2 * SHARD + 5],  # over three shards
        [SHARD, SHARD + 2, SHARD + 3, SHARD + 5, SHARD + 6],  # five in one shard
    )
    reset = np.zeros((devices * SHARD, len(starts)), bool)
    for row, at in enumerate(starts):
        reset[[t for t in at if t < len(reset)], row] = True
    return reset


def tokens(devices):
    """What every token does, by kind of transition, leaves [T, B, ...], and the initial states."""
    rng, reset = np.random.default_rng(devices), documents(devices)
    T, B = reset.shape
    normal = lambda *shape: rng.normal(size=shape)
    first = lambda a: np.where(reset.reshape(T, B, *[1] * (a.ndim - 2)), 0, a)
    planes = lambda *shape: Complex(normal(*shape), normal(*shape))
    decay = lambda *shape: first(1 / (1 + np.exp(-normal(T, B, *shape))))
    stretches = {
        "one decay a head": Diagonal(decay(2, 1, 1), normal(T, B, 2, K, V)),
        "one a channel": Diagonal(decay(2, K, 1), normal(T, B, 2, K, V)),
        "complex": Diagonal(
            jax.tree.map(lambda a: first(0.6 * a), planes(T, B, V)), planes(T, B, V)
        ),
        "matrix": Matrix(first(0.4 * normal(T, B, 2, K, K)), normal(T, B, 2, K, V)),
    }
    size = lambda t: jax.tree.map(lambda a: normal(*a.shape[1:]), t.update)
    return stretches, {kind: size(t) for kind, t in stretches.items()}


def shard_by_shard(stretches, states):
    """The states that enter shards, stacked, and the last ones, by kind; token after token."""

    def step(states, token):
        return {kind: token[kind](state) for kind, state in states.items()}, states

    last, entering = jax.lax.scan(step, states, stretches)
    return jax.tree.map(lambda a: a[::SHARD], entering), last


def over_devices(stretches, states):
    """The same on the ambient mesh."""

    def shard(stretches, states):
        entering, last = {}, {}
        for kind, state in states.items():
            stretch = compose(stretches[kind])
            entering[kind], last[kind] = sequence.enter(stretch, state, current_travel())
        return jax.tree.map(lambda a: a[None], entering), last

    return jax.shard_map(shard, in_specs=(P(SEQ), P()), out_specs=(P(SEQ), P()))(stretches, states)


def value_and_gradients(run):
    def loss(stretches, states):
        results = run(stretches, states)
        leaves = jax.tree.leaves(results)
        return sum(jnp.sum(jnp.sin(a + i)) for i, a in enumerate(leaves)), results

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


@functools.cache
def expected(devices):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, value_and_gradients(shard_by_shard)(*tokens(devices)))


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("strategy", WAYS)
def test_every_strategy_equals_token_after_token(strategy, devices):
    options = WAYS[strategy] | ({"hops": devices - 1} if strategy == "window" else {})
    with jax.enable_x64(True), use_mesh(seq=devices, strategy=strategy, **options):
        run = lambda *args: over_devices(*args)  # a trace remembers its mesh
        gradients, results = value_and_gradients(run)(*tokens(devices))
    assert_close(results, expected(devices)[1])
    assert_close(gradients, expected(devices)[0], GRADIENT)


@pytest.mark.parametrize("strategy", WAYS)
def test_max_plus_travels_too(strategy):
    """The unit in which exponential gates are kept: it begins at -inf and no gradient passes."""
    rng = np.random.default_rng(0)
    shift, floor = rng.normal(size=(2, 8, 3, 4)).astype(np.float32)
    shift[[2, 5], [0, 1]] = -np.inf
    stretches, state = MaxPlus(shift, floor), np.full((3, 4), -np.inf, np.float32)
    step = lambda state, stretch: (stretch(state), state)
    last, entering = jax.lax.scan(step, state, stretches)

    def shard(stretch, state):
        stretch = jax.tree.map(lambda a: a[0], stretch)
        entering, last = sequence.enter(stretch, state, current_travel())
        return entering[None], last

    with use_mesh(seq=8, strategy=strategy, hops=7):
        actual = jax.jit(jax.shard_map(shard, in_specs=(P(SEQ), P()), out_specs=(P(SEQ), P())))(
            stretches, state
        )
    np.testing.assert_allclose(actual[0], entering, rtol=FORWARD["float32"])
    np.testing.assert_allclose(actual[1], last, rtol=FORWARD["float32"])


def test_a_window_is_exact_for_documents_that_it_spans_and_wrong_for_longer_ones():
    def carried(hops):  # the longest document of those below touches four shards
        reset = np.zeros((8 * SHARD, 1), bool)
        reset[[0, 5, 3 * SHARD + 2, 4 * SHARD]] = True
        decay = np.where(reset, 0, np.full(reset.shape, 0.99))
        stretches = {"": Diagonal(decay, np.ones(reset.shape))}
        with jax.enable_x64(True):
            expected = shard_by_shard(stretches, {"": np.ones(1)})[0][""]
            with use_mesh(seq=8, strategy="window", hops=hops):
                run = jax.jit(lambda *args: over_devices(*args))  # a trace remembers its mesh
                actual = run(stretches, {"": np.ones(1)})[0][""]
        return np.max(np.abs(actual - expected))

    assert carried(3) < 1e-12
    assert carried(2) > 1


@pytest.mark.parametrize("strategy, options", [("doubling", {}), ("two_level", {"row": 2})])
def test_recurrences_with_shared_heads_on_a_mesh_of_data_and_time(strategy, options):
    rng = np.random.default_rng(0)
    B, T, G, H = 2, 32, 2, 4
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    q, k, v, state = (
        normal(B, T, G, K),
        unit(normal(B, T, G, K)),
        normal(B, T, H, V),
        normal(B, H, K, V),
    )
    beta, log_decay, reset = (
        rng.random((B, T, H)),
        -rng.random((B, T, H, 1)),
        rng.random((B, T)) < 0.05,
    )
    beta, log_decay = beta.astype(np.float32), log_decay.astype(np.float32)

    def run(q, k, v, beta, log_decay, state):
        plain = decayed_outer_product(q, k, v, log_decay, reset, state, chunk_size=8)
        delta = delta_rule(q, k, v, beta, log_decay, reset, state, chunk_size=8)
        return plain, delta

    def loss(*args):
        results = run(*args)
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(results)), results

    both = lambda: jax.jit(jax.grad(lambda *a: loss(*a), tuple(range(6)), has_aux=True))
    args = (q, k, v, beta, log_decay, state)
    gradients, results = both()(*args)
    with use_mesh(data=2, seq=4, strategy=strategy, **options):
        actual_gradients, actual = both()(*args)
    assert_close(actual, results)
    assert_close(actual_gradients, gradients, GRADIENT)


# What is sent, counted in compiled programs: the layer is a memory with one decay a head.

B, H = 1, 4
STATE, DECAYS = B * H * K * V * 4, B * H * 4  # bytes


def program(backward=False, T=64, **options):
    """The compiled program of a layer whose final state nobody uses, on eight devices."""
    shapes = (B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H, 1)
    split = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.P(None, SEQ))

    def layer(q, k, v, log_decay):
        reset = jnp.zeros(q.shape[:2], bool)
        return decayed_outer_product(q, k, v, log_decay, reset, jnp.zeros((B, H, K, V)))[0]

    def gradients(*tokens):
        y, pullback = jax.vjp(layer, *tokens)
        return pullback(y)

    with use_mesh(seq=8, **options):
        return jax.jit(gradients if backward else layer).lower(*map(split, shapes)).compile()


def sent(compiled):
    """How often each collective runs, and the bytes that each device receives by it in all."""
    bodies = dict(
        re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", compiled.as_text(), re.M | re.S)
    )
    trips = dict.fromkeys(bodies, 1)
    loops = r"while\(.*body=%([\w.-]+).*known_trip_count\W+n\W+(\d+)"
    for text in bodies.values():
        for body, count in re.findall(loops, text):
            trips[body] = int(count)
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    found = {}
    for name, text in bodies.items():
        for shape, kind in re.findall(rf"= f32\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", text):
            times, size = found.get(kind, (0, 0))
            block = 4 * math.prod(map(int, shape.split(",")))
            found[kind] = times + trips[name], size + trips[name] * block
    return found


TRAFFIC = {
    "all_gather": ({}, {"all-gather": (1, 8 * (STATE + DECAYS))}),
    "ring": ({}, {"collective-permute": (7, 7 * STATE)}),
    "all_scan": ({"blocks": 4}, {"collective-permute": (10, STATE * (1 + 6 / 4))}),
    "doubling": ({}, {"collective-permute": (4, 3 * (STATE + DECAYS) + STATE)}),
    "window": ({"hops": 2}, {"collective-permute": (2, 2 * STATE)}),
    # along a row of four in two blocks; a quarter of a state to the other row
    "two_level": (
        {"row": 4, "blocks": 2},
        {
            "collective-permute": (4 + 1, 4 * (STATE + DECAYS) / 2 + STATE / 4),
            "reduce-scatter": (1, (STATE + DECAYS) / 4),
            "all-gather": (1, STATE),
        },
    ),
}


@pytest.mark.parametrize("strategy", TRAFFIC)
def test_a_layer_sends_what_its_strategy_says_and_no_more(strategy):
    options, expected = TRAFFIC[strategy]
    assert sent(program(strategy=strategy, **options)) == expected
    backward = sent(program(backward=True, strategy=strategy, **options))
    assert backward == {kind: (2 * n, 2 * size) for kind, (n, size) in expected.items()}


@pytest.mark.parametrize(
    "strategy, T",
    [("all_gather", 256), ("all_scan", 256), ("all_scan", 8 * 4 * 64)],  # the last beside work
)
def test_what_is_sent_does_not_depend_on_the_length(strategy, T):
    options, expected = TRAFFIC[strategy]
    assert sent(program(T=T, strategy=strategy, **options)) == expected


def test_the_total_of_all_shards_is_one_all_reduce():
    written = np.arange(8.0 * 6, dtype=np.float32).reshape(8, 2, 3)
    shard = lambda a: sequence.total(Diagonal(jnp.ones_like(a), a))
    with use_mesh(seq=8):
        lifted = jax.jit(jax.shard_map(shard, in_specs=P(SEQ), out_specs=P()))
        np.testing.assert_array_equal(lifted(written)[0], written.sum(0))
        assert sent(lifted.lower(written).compile()) == {"all-reduce": (1, 24)}


def test_auto_says_once_what_it_chose_and_why(caplog):
    shard = lambda a: sequence.enter(Diagonal(a, a), jnp.zeros((1, 77)), current_travel())[1]
    with caplog.at_level(logging.INFO, "seqlab"), use_mesh(seq=8, strategy="auto"):
        for _ in range(2):
            lifted = jax.jit(jax.shard_map(lambda a: shard(a), in_specs=P(SEQ), out_specs=P()))
            last = lifted(np.full((8, 77), 0.5, np.float32))
    assert_close(last, np.full((1, 77), 1 - 0.5**8, np.float32))
    (said,) = [record.message for record in caplog.records if record.name == "seqlab"]
    assert re.match(r"States of 308 bytes travel by \w+: .* by the cost model; .*all_scan", said)


def test_a_length_that_does_not_divide_evenly_is_exact_and_said_once(caplog):
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 2, 23, 4)).astype(np.float32)
    args = a, b, rng.random((2, 23)) < 0.1, np.ones((2, 4), np.float32)
    expected = linear_scan(*args)
    with caplog.at_level(logging.WARNING, "seqlab"), use_mesh(seq=4):
        for _ in range(2):
            assert_close(jax.jit(lambda *args: linear_scan(*args))(*args), expected)
        linear_scan(*(a[:, :1] for a in args[:3]), args[3])  # one token is nothing to share
    (said,) = [record.message for record in caplog.records if record.name == "seqlab"]
    assert "23 tokens do not divide evenly over the 4 devices of the mesh axis seq" in said


def test_blocks_that_do_not_divide_a_state_are_one_sentence():
    with pytest.raises(
        ConfigError, match=r"blocks=3 does not divide a state of shape \[1, 4, 4, 8\]"
    ):
        program(strategy="all_scan", blocks=3)
