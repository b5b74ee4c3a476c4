"""What a model's projections read, seen while it reads a text."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.layers.linear import Linear
from seqlab.layers.linear_kinds import replace
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters


def largest_inputs(
    model: lm.LM, names: Iterable[str], batches: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """The largest |x| of every input of the named linear maps, [d_in], or [repeats, d_in] where
    they are stacked, while the model reads batches of tokens [B, T]."""
    params = parameters(model)
    seen = {name: np.zeros(params[f"{name}.weight"].shape[:-1], np.float32) for name in names}
    watched = bind(model, params)  # parts of its own
    watch = lambda part, path: (
        _Watched(part, functools.partial(_note, seen[path])) if path in seen else part
    )
    replace(watched, lambda part: type(part) is Linear, watch)
    run = jax.jit(lambda model, tokens: model(tokens)[0])
    for tokens in batches:
        jax.block_until_ready(run(watched, jnp.asarray(tokens)))
    jax.effects_barrier()
    return seen


def _note(seen: np.ndarray, index: np.ndarray, largest: np.ndarray) -> None:
    rows = seen.reshape(-1, seen.shape[-1])
    rows[index] = np.maximum(rows[index], largest)


class _Watched(nnx.Module):
    """A linear map that reports which of the stacked ones it is, and its largest inputs."""

    def __init__(self, linear: Linear, report: Callable):
        self.linear, self.report = linear, report
        lead = linear.weight.shape[:-2]
        self.index = nnx.Param(jnp.arange(np.prod(lead, dtype=int)).reshape(lead))

    def __call__(self, x: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(x), tuple(range(x.ndim - 1)))
        jax.debug.callback(self.report, self.index[...], largest.astype(jnp.float32))
        return self.linear(x)
