"""What stages of linearization make small: distances from a teacher that say what they should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.layers.mixers import attention, gla, rwkv7
from seqlab.linearize import losses
from seqlab.linearize.transfer import Models
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters
from seqlab.train.corpus import Batch
from seqlab.train.objective import NEXT_TOKEN

VOCAB = 23
ATTENTION = attention.Config(heads=2, max_length=16)


def model(mixer, seed: int = 0, **fields) -> lm.LM:
    """Three layers, of which the last two are replaced, and a vocabulary that no part divides."""
    shape = {"before": (ATTENTION,), "pattern": (mixer,), "repeats": 2, "tie_embeddings": False}
    config = lm.Config(vocab=VOCAB, d_model=16, ffn=None, dtype="float32", **shape | fields)
    return config.build(rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def asked():
    """Two rows of packed documents, the second with padding."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 13)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 8, [1] * 9 + [0] * 4], np.int32)
    return NEXT_TOKEN.ask(Batch(tokens, segments))


def plain(teacher: lm.LM, student: lm.LM, teachers, ours, labels):
    """The definition, with all logits at once."""
    logits = student.logits(ours)
    p, q = jax.nn.log_softmax(teacher.logits(teachers)), jax.nn.log_softmax(logits)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(jnp.exp(p) * (p - q), -1), nats


@pytest.mark.parametrize(
    "fields",
    [
        {"head_bias": True},
        {"tie_embeddings": True, "logit_scale": 3.0, "logit_cap": 5.0},
        {"linear": "bit"},
    ],
    ids=["own head", "tied, scaled and bent", "ternary head"],
)
def test_the_divergence_in_parts_of_the_vocabulary_is_its_definition(asked, fields):
    models = Models(*(model(ATTENTION, seed, **fields) for seed in (1, 2)))
    spread = jax.random.normal(jax.random.key(0), (2, *asked.labels.shape, 16))
    head = [n for n in parameters(models.student) if n.split(".")[0] in ("embed", "head")]

    def ask(of, ours, weights):
        student = bind(models.student, parameters(models.student) | weights)
        apart, nats = of(models.teacher, student, spread[0], ours, asked.labels)
        return jnp.sum(apart * asked.weights + 0.3 * jnp.sin(nats)), (apart, nats)

    def in_parts(teacher, student, teachers, ours, labels):
        return losses.divergence(Models(teacher, student), teachers, ours, labels, size=5)

    weights = {name: parameters(models.student)[name] for name in head}
    answers = [
        jax.jit(jax.value_and_grad(functools.partial(ask, of), (0, 1), has_aux=True))(
            spread[1], weights
        )
        for of in (in_parts, plain)
    ]
    ((_, values), grads), ((_, expected), expected_grads) = answers
    assert float(jnp.max(expected[0])) > 0.5
    assert_close(values, expected)
    assert_close(grads, expected_grads, GRADIENT)


def test_no_logits_of_the_whole_vocabulary_ever_stand_in_memory(asked):
    models = Models(model(ATTENTION, 1), model(ATTENTION, 2))
    hidden = jnp.ones((2, 12, 16))
    f = lambda h: sum(map(jnp.sum, losses.divergence(models, hidden, h, asked.labels, size=5)))
    program = str(jax.make_jaxpr(jax.grad(f))(hidden))
    assert "f32[2,12,5]" in program and f"[2,12,{VOCAB}]" not in program


GLA, WINDOW = gla.Config(heads=2), dataclasses.replace(ATTENTION, window=4)
SHARING = rwkv7.Config(heads=2, first=False)  # values of layers, and of no teacher's


@pytest.fixture(scope="module")
def ask():
    """ask(loss, mixer, asked) -> gradients by the student's weights, and the Loss"""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def ask(loss, mixer, params, teacher, asked):
        def total(params):
            skeleton = jax.eval_shape(lambda: model(mixer))
            found = loss(Models(teacher, bind(skeleton, params)), asked)
            return found.nats, found

        return jax.grad(total, has_aux=True)(params)

    teacher = model(ATTENTION, 1)
    return lambda loss, mixer, asked: ask(loss, mixer, parameters(model(mixer, 2)), teacher, asked)


def test_the_layer_loss_is_each_mixer_on_what_the_teachers_reads(asked, ask):
    teacher, student = model(ATTENTION, 1), model(GLA, 2)
    counts = np.asarray(asked.weights > 0)

    @jax.jit
    def errors(teacher, student):
        x, found = teacher.embed.weight[...][asked.tokens], []
        x = teacher.before[0](x, teacher.before[0].init_state(2), asked.reset)[0]
        for i in range(2):
            block, other = (jax.tree.map(lambda a: a[i], m.blocks[0]) for m in (teacher, student))
            read = block.mixer_norm(x)
            y, ours = (m.mixer(read, reset=asked.reset)[0] for m in (block, other))
            found.append((jnp.sum((ours - y) ** 2, -1), jnp.sum(y**2, -1)))
            x = block(x, block.init_state(2), asked.reset)[0]
        return found

    relative = [np.sum(e * counts) / np.sum(s * counts) for e, s in errors(teacher, student)]
    _, total = ask(losses.layer, GLA, asked)
    assert set(total.seen) == {"layer_1", "layer_2"}
    tokens = float(total.tokens)
    assert tokens == counts.sum() == 4 + 7 + 8
    seen = [float(total.seen[f"layer_{i}"]) / tokens for i in (1, 2)]
    assert_close(np.float32(seen), np.float32(relative))
    assert_close(np.float32(total.nats / tokens), np.float32(np.mean(relative)))


@pytest.mark.parametrize("mixer", [GLA, SHARING], ids=["gla", "one that shares"])
def test_the_layer_loss_trains_mixers_alone(asked, ask, mixer):
    grads, _ = ask(losses.layer, mixer, asked)
    moved = {name for name, g in grads.items() if np.any(np.asarray(g))}
    assert moved and all(name.startswith("blocks.0.mixer.") for name in moved)


@pytest.mark.parametrize(
    "loss, mixer",
    [(losses.layer, GLA), (losses.hidden, WINDOW), (losses.kl(), WINDOW)],
    ids=["layer", "hidden", "kl"],
)
def test_padding_counts_nowhere(asked, ask, loss, mixer):
    other = asked._replace(tokens=jnp.where(asked.segment_ids > 0, asked.tokens, 7))
    answers = (jax.tree.leaves(ask(loss, mixer, batch)) for batch in (asked, other))
    for one, another in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("loss", [losses.layer, losses.kl()], ids=["layer", "kl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(asked, loss):
    teacher = model(ATTENTION, 1)
    same = {"implementation": "xla"}  # another config, the same numbers
    student = bind(model(attention.Config(heads=2, max_length=16, **same)), parameters(teacher))
    total = jax.jit(loss)(Models(teacher, student), asked)
    assert abs(float(total.nats)) < 1e-5
