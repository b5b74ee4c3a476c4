"""Memories trained at test time: the dual form in windows agrees with the definition, token by
token, wherever documents start and sequences are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels import test_time_memory as kernel
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.test_time_memory import State, Weights
from seqlab.kernels.test_time_memory import test_time_memory as titans
from seqlab.kernels.test_time_memory import test_time_training as ttt

B, H, K, V, HIDDEN = 2, 2, 6, 5, 7
T, CHUNK = 45, 4  # more than one group of chunks


def weights(rng, depth, *, bias=False, norm=False) -> Weights:
    sizes = [K, *[HIDDEN] * (depth - 1), K if norm else V]
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    layers = tuple(rng.normal(size=(H, i + bias, o)) * i**-0.5 for i, o in pairs)
    gain, offset = rng.normal(size=(2, H, sizes[-1]))
    return Weights(layers, (1 + 0.1 * gain, 0.1 * offset) if norm else ())


def document(rng, W: Weights, T=T, *, resets=0.08, gates=3):
    """q, k, v, gates and reset; the rate is small enough for any of them."""
    q, k = rng.normal(size=(2, B, T, H, K)) * K**-0.5
    v = rng.normal(size=(B, T, H, W.layers[-1].shape[-1]))
    rate = 0.1 * rng.random((B, T, H))
    log_momentum, log_decay = -rng.exponential(size=(2, B, T, H))
    reset = rng.random((B, T)) < resets
    reset[:, 0] = False
    return q, k, v, *(rate, log_momentum, 0.1 * log_decay)[:gates], reset


def left(rng, W: Weights, *, start=True) -> State:
    """A state in the middle of a chunk, other for each row."""
    some = lambda: tuple(0.1 * rng.normal(size=(B, *a.shape)) for a in W.layers)
    phase = np.broadcast_to(np.array([[2], [0]], np.int32), (B, H))
    return State(some(), some(), some() if start else (), phase)


def empty(W: Weights, **parts) -> State:
    """In float64."""
    wide = lambda a: np.asarray(a, np.float64) if a.dtype == np.float32 else np.asarray(a)
    return jax.tree.map(wide, kernel.empty(B, W.layers, **parts))


@functools.cache
def jitted(f, **options):
    """f(implementation, *args) -> results, gradients of all numbers."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *args):
        def loss(args):
            y, state = f(*args, implementation=implementation, **options)
            ends = (y, *jax.tree.leaves(state[:3]))
            return sum(jnp.sum(jnp.sin(a * (1 + n))) for n, a in enumerate(ends)), (y, state)

        grads, out = jax.grad(loss, has_aux=True, allow_int=True)(args)
        floats = lambda tree: [a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0]
        return out, floats(grads)

    return in_float64(run)


@functools.cache
def forward(f, **options):
    """f(*args) -> results, by the implementation that is chosen."""
    return in_float64(jax.jit(functools.partial(f, **options)))


def in_float64(run):
    def wide(*args):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, run(*args))

    return wide


def assert_agree(actual, expected):
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)


@pytest.mark.parametrize(
    "depth, options",
    [
        (1, {"decay_to": "zero", "activation": "silu", "bias": True}),
        (2, {}),
        (3, {"read": "chunk", "norm": True}),
    ],
    ids=str,
)
def test_the_dual_form_equals_the_definition_in_float64(depth, options):
    shape = {name: options[name] for name in options if name in ("bias", "norm")}
    options = {name: options[name] for name in options if name not in shape}
    rng = np.random.default_rng(depth)
    W = weights(rng, depth, **shape)
    args = *document(rng, W), W, left(rng, W)
    run = jitted(titans, chunk_size=CHUNK, **options)
    assert_agree(run("xla", *args), run("reference", *args))


def test_the_dual_form_of_ttt_equals_its_definition_in_float64():
    rng = np.random.default_rng(2)
    W = weights(rng, 2, bias=True, norm=True)
    scale = 0.2 + rng.random((H, CHUNK))
    args = *document(rng, W, gates=1), W, scale, left(rng, W, start=False)
    run = jitted(ttt)
    assert_agree(run("xla", *args), run("reference", *args))


def test_gates_at_their_extremes_are_exact_and_finite():
    rng = np.random.default_rng(0)
    W = weights(rng, 2)
    q, k, v, rate, *gates, reset = document(rng, W)
    extreme = lambda gate: np.where(rng.random(gate.shape) < 0.5, -80.0, -1e-6)
    args = q, k, v, rate, *map(extreme, gates), reset, W, left(rng, W)
    run = jitted(titans, chunk_size=CHUNK)
    out = run("xla", *args)
    assert_agree(out, run("reference", *args))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(out))


def test_cuts_anywhere_in_a_chunk_change_nothing():
    rng = np.random.default_rng(1)
    W = weights(rng, 2)
    tokens, state = document(rng, W), left(rng, W)
    run = forward(titans, chunk_size=CHUNK)
    whole, last = run(*tokens, W, state)
    for at in (20, 25):  # other phases, the same shapes
        first, between = run(*(a[:, :at] for a in tokens), W, state)
        second, end = run(*(a[:, at:] for a in tokens), W, between)
        assert_close(np.concatenate([first, second], 1), whole)
        assert_close(end, last)


def test_what_is_packed_before_a_document_changes_nothing():
    rng = np.random.default_rng(2)
    W = weights(rng, 2)
    tokens, run = document(rng, W, resets=0.0), forward(titans, chunk_size=CHUNK)
    tokens[-1][:, 0] = True
    alone, _ = run(*tokens, W, left(rng, W))
    for start in (1, 4, 13):  # another document ends there, of noise
        noise = [rng.normal(size=a[:, :start].shape) for a in tokens[:3]]
        before = *noise, *(a[:, :start] for a in tokens[3:])
        packed = (
            np.concatenate([a, b[:, :-start]], 1) for a, b in zip(before, tokens, strict=True)
        )
        y, _ = run(*packed, W, left(rng, W))
        assert_close(y[:, start:], alone[:, :-start])


def test_a_state_that_ran_out_of_numbers_is_forgotten_at_a_reset():
    rng = np.random.default_rng(3)
    W = weights(rng, 2)
    tokens = document(rng, W)
    tokens[-1][:, 0] = True
    state = jax.tree.map(lambda a: a * np.nan if a.dtype == np.float64 else a, left(rng, W))
    out = forward(titans, chunk_size=CHUNK)(*tokens, W, state)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(out))


def test_a_linear_memory_without_momentum_is_the_gated_delta_rule():
    """With chunks of one token, beta = 2 rate / (1 - alpha) and v' = (1 - alpha) v: the delta rule
    takes its error after the decay, Titans before."""
    rng = np.random.default_rng(4)
    W = Weights((np.zeros((H, K, V)),))
    q, k, v, rate, _, log_decay, reset = document(rng, W)
    state = left(rng, W)._replace(phase=np.zeros((B, H), np.int32))
    no_momentum = np.full_like(rate, -1e4)
    run = forward(titans, chunk_size=1)
    y, last = run(q, k, v, rate, no_momentum, log_decay, reset, W, state)
    kept = np.exp(log_decay)
    with jax.enable_x64(True):
        expected, memory = delta_rule(
            q, k, kept[..., None] * v, 2 * rate / kept, log_decay[..., None], reset, *state.weights
        )
    assert_close(y, expected)
    assert_close(last.weights[0], memory)


def test_sums_over_gradients_of_every_token_give_the_same():
    """Per-token gradients by autodiff, and two linear recurrences over arrays like the weights."""
    rng = np.random.default_rng(5)
    W, length = weights(rng, 2), 2 * CHUNK
    q, k, v, rate, log_momentum, log_decay, reset = document(rng, W, length, resets=0.0)
    state = empty(W)
    run = forward(titans, chunk_size=CHUNK, decay_to="zero")
    y, _ = run(q, k, v, rate, log_momentum, log_decay, reset, W, state)
    f = lambda W, x: jax.nn.gelu(x @ W[0]) @ W[1]
    gradient = jax.grad(lambda W, k, v: jnp.sum((f(W, k) - v) ** 2))

    def one_head(layers, q, k, v, rate, momentum, kept):
        now, S, answers = layers, jax.tree.map(jnp.zeros_like, layers), []
        for t in range(length):
            if t % CHUNK == 0:
                chunk = slice(t, t + CHUNK)
                of_chunk = jax.vmap(gradient, (None, 0, 0))(now, k[chunk], v[chunk])
            g = [a[t % CHUNK] for a in of_chunk]
            S = [momentum[t] * s - rate[t] * a for s, a in zip(S, g, strict=True)]
            now = [kept[t] * w + s for w, s in zip(now, S, strict=True)]
            answers.append(f(now, q[t]))
        return jnp.stack(answers)

    with jax.enable_x64(True):
        per_head = jax.vmap(one_head, (0, *(1,) * 6), 1)
        args = (q, k, v, rate, np.exp(log_momentum), np.exp(log_decay))
        assert_close(y, jax.jit(jax.vmap(functools.partial(per_head, list(W.layers))))(*args))


def test_ttt_is_a_gradient_step_on_every_token_of_a_chunk():
    """Sun et al. (2024), as their code has it: 1/2 |norm(k W + b) - (v - k)|^2, and the step of
    token j towards token i is scale_i rate_j."""
    rng = np.random.default_rng(6)
    W = weights(rng, 1, bias=True, norm=True)
    q, k, v, rate, reset = document(rng, W, 2 * CHUNK, resets=0.0, gates=1)
    scale = 0.2 + rng.random((1, CHUNK))
    with jax.enable_x64(True):
        y, _ = jax.jit(ttt)(q, k, v, rate, reset, W, scale, empty(W, start=False))

        def one_head(W, gain, bias, q, k, v, rate):
            norm = lambda h: gain * jax.nn.standardize(h, epsilon=1e-6) + bias
            loss = lambda p, k, v: jnp.sum((norm(k @ p[0] + p[1]) - (v - k)) ** 2) / 2
            (W, b), answers = (W[:-1], W[-1]), []
            for start in (0, CHUNK):
                chunk = slice(start, start + CHUNK)
                g = jax.vmap(jax.grad(loss), (None, 0, 0))((W, b), k[chunk], v[chunk])
                for i in range(CHUNK):
                    step = scale[0, i] * rate[chunk] * (np.arange(CHUNK) <= i)
                    W_i, b_i = W - jnp.einsum("j,jio->io", step, g[0]), b - step @ g[1]
                    x = q[start + i]
                    answers.append(x + norm(x @ W_i + b_i))
                W, b = W_i, b_i
            return jnp.stack(answers)

        per_head = jax.vmap(one_head, (0, 0, 0, *(1,) * 4), 1)
        expected = jax.jit(jax.vmap(functools.partial(per_head, *W.layers, *W.norm)))(q, k, v, rate)
        assert_close(y, expected)


@pytest.mark.parametrize("fraction, finite", [(1.0, True), (40.0, False)])
def test_a_hundred_thousand_tokens_stay_finite_at_rates_that_are_said_to(fraction, finite):
    """At the rates of the docstring for chunks of 16, with a memory of two layers that is long and
    has no time to rest."""
    piece, tokens, width = 1_000, 100_000, 4
    shape = (1, piece, 1, width)
    W = Weights((0.5 * np.ones((1, width, width), np.float32),) * 2)
    unit = lambda a: a / jnp.linalg.norm(a, axis=-1, keepdims=True)

    def read(state, key):
        q, k, v = (unit(jax.random.normal(one, shape)) for one in jax.random.split(key, 3))
        gate = jnp.ones(shape[:3])
        gates = 0.1 * fraction * gate, jnp.log(0.1) * gate, jnp.log(0.98) * gate
        y, state = titans(q, k, v, *gates, jnp.zeros(shape[:2], bool), W, state)
        return state, jnp.max(jnp.abs(y))

    keys = jax.random.split(jax.random.key(0), tokens // piece)
    state, largest = jax.jit(lambda: jax.lax.scan(read, kernel.empty(1, W.layers), keys))()
    assert np.isfinite(largest).all() == finite
    assert not finite or max(np.abs(a).max() for a in state.weights) < 10
