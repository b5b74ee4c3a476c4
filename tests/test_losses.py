"""What stages of linearization make small: distances from a teacher that say what they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.layers.mixers import attention, gla
from seqlab.linearize import losses
from seqlab.linearize.transfer import Models
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters
from seqlab.train.corpus import Batch
from seqlab.train.objective import NEXT_TOKEN

VOCAB = 23
ATTENTION = attention.Config(heads=2, max_length=16)


def model(mixer, seed: int = 0, **fields) -> lm.LM:
    """Three layers, of which the middle one is replaced, and a vocabulary that no part divides."""
    pattern = {"before": (ATTENTION,), "pattern": (mixer,), "repeats": 2, "tie_embeddings": False}
    config = lm.Config(vocab=VOCAB, d_model=16, dtype="float32", **pattern | fields)
    return config.build(rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def asked():
    """Two rows of packed documents, the second with padding."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 13)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 8, [1] * 9 + [0] * 4], np.int32)
    return NEXT_TOKEN.ask(Batch(tokens, segments))


def plain(teacher_logits, logits, asked, w_kl, w_ce):
    """The definition, with all logits at once."""
    p, q = jax.nn.log_softmax(teacher_logits), jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(p) * (p - q), -1)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, asked.labels)
    return jnp.sum(jnp.where(asked.weights > 0, w_kl * kl + w_ce * ce, 0.0))


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": True, "logit_scale": 3.0, "logit_cap": 5.0}],
    ids=["own head", "tied, scaled and bent"],
)
def test_the_divergence_in_parts_of_the_vocabulary_is_its_definition(asked, fields, monkeypatch):
    monkeypatch.setattr(losses.divergence, "__defaults__", (5,))
    teacher, student = model(ATTENTION, 1, **fields), model(gla.Config(heads=2), 2, **fields)
    scaled = {
        n: 3 * a if n in ("embed.weight", "head.weight") else a
        for n, a in parameters(teacher).items()
    }
    teacher = bind(teacher, scaled)

    def in_parts(params, teacher):
        return losses.kl(0.7, 0.3)(Models(teacher, bind(student, params)), asked).nats

    def at_once(params, teacher):
        of = lambda model: model(asked.tokens, reset=asked.reset)[0]
        return plain(of(teacher), of(bind(student, params)), asked, 0.7, 0.3)

    ask = lambda f: jax.jit(jax.value_and_grad(f))(parameters(student), teacher)
    (value, grads), (expected, expected_grads) = ask(in_parts), ask(at_once)
    assert_close(np.float32(value), np.float32(expected))
    assert float(expected) > 1
    assert_close(grads, expected_grads, GRADIENT)


def test_no_logits_of_the_whole_vocabulary_ever_stand_in_memory(asked):
    teacher, student = model(ATTENTION, 1), model(gla.Config(heads=2), 2)
    size = functools.partial(losses.divergence, size=5)
    hidden = jnp.ones((2, 12, 16))
    f = lambda h: sum(map(jnp.sum, size(Models(teacher, student), hidden, h, asked.labels)))
    program = str(jax.make_jaxpr(jax.grad(f))(hidden))
    assert "f32[2,12,5]" in program and f"[2,12,{VOCAB}]" not in program


@pytest.fixture(scope="module")
def layers(asked):
    """loss -> its Loss and gradients by the student's weights, of one teacher and student."""
    teacher, student = model(ATTENTION, 1), model(gla.Config(heads=2), 2)

    @functools.partial(jax.jit, static_argnums=0)
    def ask(loss, params, asked):
        total = lambda params: (lambda t: (t.nats, t))(
            loss(Models(teacher, bind(student, params)), asked)
        )
        return jax.grad(total, has_aux=True)(params)

    return lambda loss, asked: ask(loss, parameters(student), asked)


def test_the_layer_loss_is_each_mixer_on_what_the_teachers_reads(asked, layers):
    teacher, student = model(ATTENTION, 1), model(gla.Config(heads=2), 2)
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
    _, total = layers(losses.layer, asked)
    assert set(total.seen) == {"layer_1", "layer_2"}
    tokens = float(total.tokens)
    assert tokens == counts.sum() == 4 + 7 + 8
    seen = [float(total.seen[f"layer_{i}"]) / tokens for i in (1, 2)]
    assert_close(np.float32(seen), np.float32(relative))
    assert_close(np.float32(total.nats / tokens), np.float32(np.mean(relative)))


def test_the_layer_loss_trains_mixers_alone(asked, layers):
    grads, _ = layers(losses.layer, asked)
    moved = {name for name, g in grads.items() if np.any(np.asarray(g))}
    assert moved and all(name.startswith("blocks.0.mixer.") for name in moved)


@pytest.mark.parametrize("loss", [losses.layer, losses.hidden, losses.kl(), losses.ce])
def test_padding_counts_nowhere(asked, layers, loss):
    other = asked._replace(tokens=jnp.where(asked.segment_ids > 0, asked.tokens, 7))
    for one, another in zip(
        *(jax.tree.leaves(layers(loss, a)) for a in (asked, other)), strict=True
    ):
        np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("loss", [losses.layer, losses.hidden, losses.kl()])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(asked, loss):
    teacher = model(ATTENTION, 1)
    same = {"implementation": "xla"}  # another config, the same numbers
    student = bind(model(attention.Config(heads=2, max_length=16, **same)), parameters(teacher))
    total = jax.jit(loss)(Models(teacher, student), asked)
    assert abs(float(total.nats)) < 1e-5
