"""What a stage of linearization makes small: a distance from the teacher, or a cross-entropy.

Every loss takes the models and what a batch asks of them; padding and tokens with nothing to
predict count nowhere.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from seqlab.layers import auxiliary
from seqlab.layers.linear import Linear
from seqlab.linearize.transfer import Models, distance, layer
from seqlab.models import narrow
from seqlab.models.lm import LM
from seqlab.models.parameters import bind, parameters
from seqlab.train.objective import Asked
from seqlab.train.step import Loss, cross_entropy

Kind = Literal["layer", "hidden", "kl", "ce"]
VOCABULARY = 4096  # ids whose logits stand in memory at a time


def of(kind: Kind, w_kl: float = 1.0, w_ce: float = 0.0) -> Callable[[Models, Asked], Loss]:
    """The loss of a stage; the weights are those of `kl`."""
    return {"layer": layer, "hidden": hidden, "kl": kl(w_kl, w_ce), "ce": ce}[kind]


def measured(kind: Kind, loss: Callable) -> Callable[[Models, Asked], Loss]:
    """What held-out text is asked: the student's cross-entropy, whatever it trains for; the loss
    itself is seen by its kind."""

    def evaluation(models: Models, asked: Asked) -> Loss:
        nats, own = ce(models, asked), loss(models, asked)
        return nats._replace(seen={kind: own.nats, **own.seen})

    return ce if kind == "ce" else evaluation


def ce(models: Models, asked: Asked) -> Loss:
    """The student's cross-entropy of the next token."""
    return cross_entropy(models.student, asked)


def hidden(models: Models, asked: Asked) -> Loss:
    """The relative error of the student's last hidden vectors, after the last norm."""
    teachers, ours = _hidden(models, asked)
    counts = asked.weights > 0
    tokens = jnp.sum(counts)
    return Loss(tokens * distance(ours, teachers).relative(counts), tokens)


def kl(w_kl: float = 1.0, w_ce: float = 0.0) -> Callable[[Models, Asked], Loss]:
    """w_kl KL(teacher || student) + w_ce (cross-entropy of the next token), each the mean over
    predicted tokens (Wang et al., 2024, The Mamba in the Llama, whose KL is a mean over rows)."""

    def loss(models: Models, asked: Asked) -> Loss:
        teachers, ours = _hidden(models, asked)
        apart, nats = divergence(models, teachers, ours, asked.labels)
        counts = asked.weights > 0
        total = lambda a: jnp.sum(jnp.where(counts, a, 0.0))
        seen = {"kl": total(apart), "ce": total(nats)} if w_ce else {}
        return Loss(total(w_kl * apart + w_ce * nats), jnp.sum(counts), seen)

    return loss


def divergence(
    models: Models,
    teachers: jax.Array,
    ours: jax.Array,
    labels: jax.Array,
    size: int = VOCABULARY,
) -> tuple[jax.Array, jax.Array]:
    """KL(teacher || student) and the student's -log p(label) of every token, [B, T] float32.

    teachers, ours [B, T, D] are the hidden vectors that `LM.logits` takes, labels [B, T]. Logits of
    `size` ids stand in memory at a time, and again in the backward pass: both sums of exponentials
    are kept with the largest exponent so far.
    """
    vocab = models.student.config.vocab
    size = min(size, vocab) if all(map(_divides, models)) else vocab

    @jax.checkpoint
    def part(sums, start):
        first = jnp.minimum(start, vocab - size)  # the last part may meet the one before
        ids = first + jnp.arange(size)
        fresh = ids >= start
        t = jax.lax.stop_gradient(_logits(models.teacher, teachers, first, size))
        s = _logits(models.student, ours, first, size)
        (top, z, cross), (peak, y, label) = sums
        higher = jnp.maximum(top, jnp.max(jnp.where(fresh, t, -jnp.inf), -1))
        p = jnp.exp(jnp.where(fresh, t, -jnp.inf) - higher[..., None])
        fade = jnp.exp(top - higher)
        teacher = higher, fade * z + jnp.sum(p, -1), fade * cross + jnp.sum(p * (t - s), -1)
        masked = jnp.where(fresh, s, -jnp.inf)
        higher = jax.lax.stop_gradient(jnp.maximum(peak, jnp.max(masked, -1)))
        y = jnp.exp(peak - higher) * y + jnp.sum(jnp.exp(masked - higher[..., None]), -1)
        here = fresh & (ids == labels[..., None])
        return (teacher, (higher, y, label + jnp.sum(jnp.where(here, s, 0.0), -1))), None

    none = jnp.zeros(labels.shape, jnp.float32)
    sums = (none - jnp.inf, none, none), (none - jnp.inf, none, none)
    sums, _ = jax.lax.scan(part, sums, jnp.arange(0, vocab, size))
    (top, z, cross), (peak, y, label) = sums
    log_y = peak + jnp.log(y)
    return cross / z - (top + jnp.log(z)) + log_y, log_y - label


def _hidden(models: Models, asked: Asked) -> tuple[jax.Array, jax.Array]:
    """Last hidden vectors [B, T, D] of teacher and student."""
    with auxiliary.collect():  # what the teacher's layers add is nobody's loss here
        teachers, _ = models.teacher.hidden(asked.tokens, reset=asked.reset)
    with auxiliary.counting(asked.segment_ids > 0):
        ours, _ = models.student.hidden(asked.tokens, reset=asked.reset)
    return jax.lax.stop_gradient(teachers), ours


def _divides(model: LM) -> bool:
    """Whether logits of some ids can be had without the others."""
    return model.head is None or isinstance(model.head, Linear)


def _logits(model: LM, x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`model.logits` of the `size` ids from `start` on: [B, T, size] float32."""
    if size == model.config.vocab:
        return model.logits(x)
    params = parameters(model)
    of_ids = {"embed.weight": 0} if model.head is None else {"head.weight": 1, "head.bias": 0}
    for name, axis in of_ids.items():
        if name in params:
            cut = lambda a, at, axis=axis: jax.lax.dynamic_slice_in_dim(a, at, size, axis)
            params[name] = narrow.read(cut, params[name], start, x.dtype)
    return bind(model, params).logits(x)
