"""One step of training: the loss of packed documents, what decays, schedules, AdamW by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError
from seqlab.layers.mixers import attention, gla, mamba2
from seqlab.models import lm
from seqlab.models.parameters import bind, decays, parameters
from seqlab.train import step
from seqlab.train.config import Optimizer
from seqlab.train.corpus import Batch
from tests import leaky


def test_only_matrices_decay():
    pattern = (mamba2.Config(), gla.Config(), attention.Config(qkv_bias=True))
    mask = decays(lm.Config(vocab=9, d_model=64, pattern=pattern).skeleton())
    for word in ("norm", "A_log", "dt_bias", "bias", ".D"):
        named = [name for name in mask if word in name]
        assert named and not any(mask[name] for name in named), word
    matrices = (".gate.weight", ".up.weight", ".down.weight", ".out.weight", "embed.weight")
    for ending in matrices:
        assert all(mask[name] for name in mask if name.endswith(ending)), ending
    params = {name: jnp.full((2, 2), 3.0) for name in mask}
    optimizer = Optimizer(weight_decay=0.5, warmup=0, schedule="constant", lr=0.1).build(1, mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.1 * 0.5 * 3.0 * mask[name], rtol=1e-6)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"schedule": "constant"}, {0: 0.1, 9: 1, 10: 1, 99: 1}),
        ({"schedule": "cosine", "final": 0.1}, {0: 0.1, 9: 1, 10: 1, 55: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "decay": 0.2, "final": 0}, {4: 0.5, 80: 1, 90: 0.5, 99: 0.05, 100: 0}),
        ({"schedule": "wsd", "decay": 1.0, "final": 0.5, "warmup": 0}, {0: 1, 50: 0.75}),
        ({"schedule": "cosine", "warmup": 500}, {0: 0.002, 99: 0.2}),
        (
            {"schedule": "cosine", "final": 0, "warmup": 0, "second_half": 0.5},
            {0: 1, 25: 0.853553, 49: 0.515707, 50: 0.25, 75: 0.073223, 100: 0},
        ),
        ({"schedule": "constant", "warmup": 0, "second_half": 0.5}, {49: 1, 50: 0.5, 99: 0.5}),
    ],
)
def test_schedules_at_their_corners(fields, expected):
    rate = Optimizer(**{"lr": 2.0, "warmup": 10} | fields).learning_rate(100)
    for at, share in expected.items():
        assert float(rate(at)) == pytest.approx(2.0 * share, rel=1e-5, abs=1e-6)
    everywhere = np.asarray(rate(np.arange(100)))
    np.testing.assert_array_equal(everywhere, [np.asarray(rate(jnp.int32(i))) for i in range(100)])


def test_weight_decay_can_end_midway():
    fields = {"weight_decay": 0.5, "warmup": 0, "schedule": "constant", "lr": 0.1}
    optimizer = Optimizer(**fields, second_half_decay=0.0).build(4, {"w": True})
    params = {"w": jnp.full((2, 2), 3.0)}
    zero, state, taken = jax.tree.map(jnp.zeros_like, params), optimizer.init(params), []
    for _ in range(4):
        updates, state = optimizer.update(zero, state, params)
        taken.append(float(updates["w"][0, 0]))
    np.testing.assert_allclose(taken, [-0.15, -0.15, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("name", ["lr", "clip", "eps", "second_half"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_an_optimizer_that_cannot_work_is_refused(name, wrong):
    with pytest.raises(ConfigError, match=f"optimizer.{name} is {wrong}"):
        Optimizer(**{name: wrong})


def test_the_loss_counts_no_border_and_no_padding():
    model = leaky.tiny(seed=1)
    tokens = np.random.default_rng(0).integers(0, leaky.VOCAB, (2, 10)).astype(np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [1, 1, 1, 1, 2, 2, 0, 0, 0, 0]], np.int32)
    total = jax.jit(step.loss)(model, Batch(tokens, segments))
    apply = jax.jit(lambda model, tokens: model(tokens)[0])
    nats, count = 0.0, 0
    for row, ids in zip(tokens, segments, strict=True):
        for document in set(ids.tolist()) - {0}:
            text = row[ids == document]
            logits = np.asarray(apply(model, text[None])[0], np.float64)
            chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats -= sum(chances[t, text[t + 1]] for t in range(len(text) - 1))
            count += len(text) - 1
    assert int(total.tokens) == count == 11
    assert_close(np.float32(total.nats), np.float32(nats))


def test_a_step_is_adamw_on_the_mean_loss():
    model = leaky.tiny(seed=1)
    tokens = np.random.default_rng(0).integers(0, leaky.VOCAB, (2, 10)).astype(np.int32)
    batch, params = Batch(tokens, np.ones_like(tokens)), parameters(model)
    config = Optimizer(clip=0.1, warmup=0, schedule="constant")
    optimizer = config.build(1, decays(model))

    def mean(params):
        total = step.loss(bind(model, params), batch)
        return total.nats / total.tokens

    grads = jax.jit(jax.grad(mean))(params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    by_hand = {}
    for name, decays_here in decays(model).items():
        weight, g = np.asarray(params[name]), np.asarray(grads[name]) * min(1, 0.1 / norm)
        sign = g / (np.abs(g) + config.eps)  # the first step of Adam
        by_hand[name] = weight - config.lr * (sign + config.weight_decay * weight * decays_here)
    copies = {name: jnp.array(np.asarray(a)) for name, a in params.items()}
    began = optimizer.init(params)
    updated, _, metrics = step.make_step(model, optimizer)(copies, began, batch)
    assert all(a.is_deleted() for a in jax.tree.leaves((copies, began)) if a.ndim), "not donated"
    assert_close(updated, by_hand, GRADIENT)
    assert_close(metrics["grad_norm"], norm, GRADIENT)
    assert int(metrics["tokens"]) == 18
