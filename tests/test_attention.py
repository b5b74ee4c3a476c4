"""Softmax attention, the kernel, against its definition and torch."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError
from seqlab.kernels.attention import EMPTY, attention, attention_with_lse, definition
from seqlab.kernels.attention.visible import visible, visible_blocks
from seqlab.kernels.attention.xla import blockwise

B, BLOCK = 2, 16
BLOCKS = BLOCK, BLOCK // 2

# T, S, heads, kv heads, window, sinks, cap
CASES = [
    (37, 53, 4, 2, None, 0, None),
    (16, 64, 2, 2, 9, 0, 1.5),
    (33, 5, 3, 1, 7, 2, None),
    (2, 130, 2, 1, 40, 3, 1.5),
]


def tokens(T, S, H, G, seed=0, dtype=np.float64, K=6, V=5):
    """Random everything, in no order: any mask is allowed. Query 0 of every row sees nothing."""
    r = np.random.default_rng(seed)
    q, k, v = (r.normal(size=s) for s in [(B, T, H, K), (B, S, G, K), (B, S, G, V)])
    q_position, k_position = (r.integers(0, 60, (B, n)) for n in (T, S))
    q_document, k_document = r.integers(0, 3, (B, T)), r.integers(-1, 3, (B, S))
    q_document[:, 0] = -1
    at = q_position, q_document, k_position, k_document
    return [a.astype(dtype) for a in (q, k, v)], [a.astype(np.int32) for a in at]


def with_gradients(run, qkv, at, options):
    """y, log-sum-exp, and the gradients of q, k, v of a loss that weighs every output."""

    def loss(qkv):
        y, lse = run(*qkv, *at, **options)
        seen = jnp.where(lse > EMPTY, lse, 0)
        return jnp.sum(jnp.sin(y.astype(lse.dtype))) + jnp.sum(jnp.cos(seen)), (y, lse)

    gradients, (y, lse) = jax.jit(jax.grad(loss, has_aux=True))([jnp.asarray(a) for a in qkv])
    return (y, lse), gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blockwise_equals_the_definition(case):
    T, S, H, G, window, sinks, cap = case
    options = {"window": window, "sinks": sinks, "scale": 0.7, "cap": cap}
    with jax.enable_x64(True):
        qkv, at = tokens(T, S, H, G)
        outputs, gradients = with_gradients(
            functools.partial(blockwise, block=BLOCKS), qkv, at, options
        )
        expected, expected_gradients = with_gradients(definition, qkv, at, options)
        assert outputs[0].dtype == jnp.float64
        assert_close(outputs, expected)
        assert_close(gradients, expected_gradients, GRADIENT)


@pytest.mark.parametrize(("window", "sinks", "cap"), [(None, 0, None), (40, 3, 1.5)])
def test_blocks_in_which_all_is_seen_equal_the_definition(window, sinks, cap):
    """Tokens in order, in one document or two: here most blocks need no mask, and go without."""
    with jax.enable_x64(True):
        qkv, _ = tokens(80, 80, 2, 1)
        position, document = np.tile(np.arange(80, dtype=np.int32), (B, 1)), np.zeros((B, 80), int)
        position[1, 50:], document[1, 50:] = np.arange(30), 1
        at = (position, document) * 2
        options = {"window": window, "sinks": sinks, "scale": 0.7, "cap": cap}
        blocks = functools.partial(blockwise, block=BLOCKS)
        actual = with_gradients(blocks, qkv, at, options)
        expected = with_gradients(definition, qkv, at, options)
        assert_close(actual[0], expected[0])
        assert_close(actual[1], expected[1], GRADIENT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_operands_keep_their_dtype_and_accumulate_in_float32(dtype):
    options = {"window": None, "sinks": 0, "scale": 0.4}
    qkv, at = tokens(37, 53, 4, 2)
    qkv = [jnp.asarray(a, dtype) for a in qkv]
    run = functools.partial(blockwise, block=BLOCKS)
    (y, lse), gradients = with_gradients(run, qkv, at, options)
    (y_, _), gradients_ = with_gradients(
        definition, [a.astype(jnp.float32) for a in qkv], at, options
    )
    assert y.dtype == dtype and lse.dtype == jnp.float32
    assert_close(y, y_)
    assert_close(gradients, gradients_, GRADIENT)


@pytest.mark.parametrize(
    ("H", "G", "window", "sinks", "cap", "filled"),
    [(4, 2, None, 0, None, 52), (3, 3, 40, 3, 1.5, 52), (4, 2, None, 0, None, 25)],
)
def test_one_query_over_what_a_state_holds_and_its_own_key_equals_the_definition(
    H, G, window, sinks, cap, filled, monkeypatch
):
    monkeypatch.setattr(sys.modules["seqlab.kernels.attention.one_query"], "SPAN", 8)
    with jax.enable_x64(True):
        (q, k, v), (q_position, q_document, *k_at) = tokens(1, 53, H, G)
        q_document[0] = 1  # the other row's query sees nothing
        k_at[1][:, filled:52] = -1

        def split(q, k, v, q_position, q_document, *k_at, **options):
            past = tuple(a[:, :52] for a in (k, v, *k_at))
            k, v, *k_at = (a[:, 52:] for a in (k, v, *k_at))
            return attention_with_lse(q, k, v, q_position, q_document, *k_at, past=past, **options)

        def run(implementation):
            options = {"window": window, "sinks": sinks, "cap": cap}
            options["implementation"] = implementation
            return with_gradients(split, [q, k, v], [q_position, q_document, *k_at], options)

        (ours, gradients), (expected, expected_gradients) = run("xla"), run("reference")
        assert_close(ours, expected)
        assert_close(gradients, expected_gradients, GRADIENT)
        assert np.abs(expected[0][0]).min() > 0 and (ours[0][1] == 0).all()


@pytest.mark.parametrize("run", [definition, functools.partial(blockwise, block=BLOCKS)])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(run):
    qkv, at = tokens(37, 53, 4, 2, dtype=np.float32)
    options = {"window": None, "sinks": 0, "scale": 0.7, "cap": 1.5}
    (y, lse), gradients = with_gradients(run, qkv, at, options)
    assert (y[:, 0] == 0).all() and (lse[:, 0] == np.float32(EMPTY)).all()
    assert (y[:, 1:] != 0).any((2, 3)).mean() > 0.9
    assert (gradients[0][:, 0] == 0).all()
    assert all(jnp.isfinite(g).all() for g in gradients)
    at[3][:] = -1  # nothing to see for anybody
    (y, _), gradients = with_gradients(run, qkv, at, options)
    assert (y == 0).all() and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (6, 2)])
def test_attention_equals_torch(window, sinks):
    """An independent oracle on packed documents: the mask is written out pair by pair."""
    lengths, H, G = [11, 1, 21], 4, 2
    position = np.concatenate([np.arange(n) for n in lengths])
    document = np.repeat(np.arange(len(lengths)), lengths)
    T = len(position)

    def sees(t, s):
        near = window is None or t - s < window or position[s] < sinks
        return document[s] == document[t] and s <= t and near

    mask = torch.tensor([[sees(t, s) for s in range(T)] for t in range(T)])
    with jax.enable_x64(True):
        qkv, _ = tokens(T, T, H, G)
        theirs = [torch.tensor(a).transpose(1, 2).requires_grad_() for a in qkv]
        y = torch.nn.functional.scaled_dot_product_attention(
            *theirs, attn_mask=mask, enable_gqa=True
        )
        y.sin().sum().backward()

        at = [jnp.broadcast_to(a.astype(np.int32), (B, T)) for a in (position, document)]
        run = lambda *qkv: attention(*qkv, *at, *at, window=window, sinks=sinks)
        ours, pull = jax.vjp(jax.jit(run), *map(jnp.asarray, qkv))
        assert_close(ours, y.detach().transpose(1, 2).numpy())
        expected = [a.grad.transpose(1, 2).numpy() for a in theirs]
        assert_close(list(pull(jnp.cos(ours))), expected, GRADIENT)


@pytest.mark.parametrize("block", [1, BLOCK])
def test_visible_blocks_miss_no_pair_skip_what_is_empty_and_mask_all_but_what_is_clear(block):
    for seed in range(12):
        _, (qp, qd, kp, kd) = tokens(48, 64, 1, 1, seed=seed)
        kd[:, 16:32] = -1
        window, sinks = [(None, 0), (8, 0), (8, 2)][seed % 3]
        split = lambda a: np.stack(np.split(a, a.shape[1] // block, 1))
        q_at, k_at = (np.stack([split(a), split(b)]) for a, b in [(qp, qd), (kp, kd)])
        some, every = visible_blocks(q_at, k_at, window, sinks)
        pairs = visible(qp[..., None], qd[..., None], kp[:, None], kd[:, None], window, sinks)
        pairs = pairs.reshape(B, 48 // block, block, 64 // block, block)
        assert not (pairs.any((0, 2, 4)) & ~some).any()
        assert not (every & ~pairs.all((0, 2, 4))).any()
        assert not some[:, 16 // block : 32 // block].any()
        if block == 1:
            assert (some == pairs.any((0, 2, 4))).all() and (every == pairs.all((0, 2, 4))).all()


@pytest.mark.parametrize(("window", "band"), [(None, 8), (17, 2), (18, 3)])
def test_work_is_that_of_the_visible_blocks(window, band):
    """The causal triangle, or a band of it: a window of C + 1 reaches one block back, no more."""
    at = np.zeros((2, 8, B, BLOCK), np.int32)
    at[0] = np.arange(8 * BLOCK).reshape(8, 1, BLOCK)
    some, every = visible_blocks(at, at, window, 0)
    n = np.arange(8)
    lag = n[:, None] - n
    assert (some == ((lag >= 0) & (lag < band))).all()
    clear = 8 if window is None else 1  # but for its edges, a band of a block and two tokens
    assert (every == ((lag > 0) & (lag < clear))).all()


def test_no_array_is_as_large_as_all_scores():
    n, shape = 4096, jax.ShapeDtypeStruct((1, 4096, 1, 4), jnp.float32)
    at = [jax.ShapeDtypeStruct((1, n), jnp.int32)] * 4

    def bytes_of(implementation):
        loss = lambda qkv, at: jnp.sum(attention(*qkv, *at, implementation=implementation))
        compiled = jax.jit(jax.grad(loss)).lower([shape] * 3, at).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of("reference") > n * n * 4
    assert bytes_of("xla") < n * n / 8


def test_attention_refuses_unknown_implementations_and_odd_head_groups():
    qkv, at = tokens(3, 3, 4, 2, dtype=np.float32)
    with pytest.raises(ConfigError, match="'xlaa'.*did you mean 'xla'"):
        attention(*qkv, *at, implementation="xlaa")
    qkv, at = tokens(3, 3, 4, 3, dtype=np.float32)
    with pytest.raises(ConfigError, match="4 query heads cannot share 3"):
        attention(*qkv, *at)
