"""One training step and one evaluation step: pure functions over flat dictionaries of arrays."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from seqlab.layers import auxiliary
from seqlab.models.lm import LM
from seqlab.models.parameters import bind
from seqlab.parallel import compiler
from seqlab.train.corpus import Batch
from seqlab.train.objective import NEXT_TOKEN, Asked


class Loss(NamedTuple):
    """Sums over predicted tokens, so that batches and hosts add up exactly.

    nats  or another measure of what is to become small, such as a relative error
    seen  more sums by name, which are logged beside the loss
    """

    nats: jax.Array
    tokens: jax.Array
    seen: dict[str, jax.Array] = {}


def cross_entropy(model: LM, asked: Asked) -> Loss:
    """Of every label that is asked for, times its weight."""
    with auxiliary.counting(asked.segment_ids > 0):
        logits, _ = model(asked.tokens, reset=asked.reset)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, asked.labels)
    counts = asked.weights > 0
    return Loss(jnp.sum(jnp.where(counts, asked.weights * nats, 0.0)), jnp.sum(counts))


def loss(model: LM, batch: Batch) -> Loss:
    """Cross-entropy of each token given those before it in its own document."""
    return cross_entropy(model, NEXT_TOKEN.ask(batch))


def objective(
    model: LM, batch: Any, loss: Callable[[LM, Any], Loss] = loss
) -> tuple[jax.Array, tuple[Loss, dict[str, jax.Array]]]:
    """What a step makes smaller, in nats; the loss alone; and what layers add to it, by name.

    What layers add, each a mean over layers, counts once for every predicted token, as the
    cross-entropy does. So the parts of an accumulated batch, each of which takes means over its own
    tokens, weigh as many tokens as they predict.
    """
    with auxiliary.collect() as found:
        total = loss(model, batch)
    means = {name: sums.mean() for name, sums in found.items()}
    more = sum((mean.loss for mean in means.values()), start=jnp.zeros(()))
    seen = total.seen | {name: total.tokens * mean.value for name, mean in means.items()}
    return total.nats + total.tokens * more, (total, seen)


def make_step(
    skeleton: LM,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    loss: Callable[[LM, Any], Loss] = loss,
    ask: Callable[[Any, jax.Array], Any] = lambda batch, key: batch,
    seed: int = 0,
) -> Callable[..., tuple[dict, Any, dict[str, jax.Array]]]:
    """step(params, optimizer state, batch, frozen={}) -> the first two updated, metrics; those two
    are donated. `frozen` are the weights of the skeleton that `params` lack, and stay as they are.

    The batch is cut in `accumulate` parts whose gradients add up to that of the whole: the loss
    is the mean over all predicted tokens of the batch, however they fall among the parts. Another
    `loss` takes batches of its own kind: those that come, or what `ask(batch, key)` makes of each,
    whole, before it is cut; the key follows from the seed and the number of updates so far. The
    metrics hold what layers add to the loss (see `objective`), each under its name.
    """

    gradient, update = make_gradient(skeleton, loss), make_update(optimizer)

    def step(params, state, batch, frozen=None):
        batch = ask(batch, jax.random.fold_in(jax.random.key(seed), _updates(state)))
        if accumulate == 1:
            return update(params, state, gradient(params, batch, frozen))
        parts = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch)

        def add(grads, part):
            more, sums = gradient(params, part, frozen)
            return jax.tree.map(jnp.add, grads, more), sums

        grads, sums = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return update(params, state, (grads, jax.tree.map(lambda a: jnp.sum(a, 0), sums)))

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler.options())


def make_gradient(skeleton: LM, loss: Callable[[LM, Any], Loss] = loss) -> Callable:
    """gradient(params, part of a batch, frozen={}) -> sums over its predicted tokens: the gradient,
    and what `objective` tells beside. Those of several parts add up."""

    def gradient(params, part, frozen=None):
        nats = lambda params: objective(_bound(skeleton, params, frozen), part, loss)
        return jax.grad(nats, has_aux=True)(params)

    return gradient


def make_update(optimizer: optax.GradientTransformation) -> Callable:
    """update(params, optimizer state, the sums of `make_gradient` over a batch) -> as a step."""

    def update(params, state, sums):
        grads, (total, seen) = sums
        count = jnp.maximum(total.tokens, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, state = optimizer.update(grads, state, params)
        metrics = {
            "loss": total.nats / count,
            "grad_norm": optax.tree.norm(grads),
            "tokens": total.tokens,
            "bad_steps": optax.tree.get(state, "notfinite_count"),  # in a row, up to now
            **{name: value / count for name, value in seen.items()},
        }
        return optax.apply_updates(params, updates), state, metrics

    return update


def make_evaluation(
    skeleton: LM,
    ask: Callable[[Batch], Asked] = NEXT_TOKEN.ask,
    loss: Callable[[LM, Any], Loss] = cross_entropy,
) -> Callable[..., Loss]:
    """evaluate(params, batch, frozen={}) -> Loss"""

    def total(params, batch, frozen=None):
        return loss(_bound(skeleton, params, frozen), ask(batch))

    return jax.jit(total, compiler_options=compiler.options())


def _bound(skeleton: LM, params: Mapping, frozen: Mapping | None) -> LM:
    return bind(skeleton, {**(frozen or {}), **params})


def _updates(state: Any) -> Any:
    """How many updates an optimizer has made, of which each of its parts keeps count."""
    counts = optax.tree.get_all_with_path(state, "count")
    return counts[0][1] if counts else 0
