"""A mixer on trial: built small, fed random documents, its programs shared by all properties."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.conformance.compiling import compiled
from seqlab.conformance.report import named
from seqlab.errors import ConfigError, SeqlabError

BATCH = 2
SHORT = 5  # tokens: fewer than a chunk has
NOISE = 0.02  # added to every parameter: weights that start at zero or one hide what they do


class Results(NamedTuple):
    """What a mixer returns, its leaves named in reports as `y` and `state.memory`."""

    y: Any  # [B, T, D]
    state: Any


class Trial:
    """The mixer, its inputs and its programs.

    x        [B, T, D] standard normal; `other` is a second one
    reset    [B, T], random; never at the first token, so that the state matters
    state    not empty: left by a document that goes on in x
    prefix   of the mixer (see `Mixer`): calls must not end within it

    Time goes into compiling: arrays are numpy's, so that slicing and adding compile nothing, and
    the properties cut T = `length` in few different ways: into `odd`, `short` and single tokens.
    A document starts at `half`, where a piece of `odd` tokens does.
    """

    def __init__(self, config: Any, d_model: int = 32, length: int = 40, seed: int = 0):
        self.given, self.d_model = config, d_model
        self.config, self.adjusted = _exercised(config, length)
        self.mixer = _stirred(_build(self.config, d_model), seed)
        self.length = length
        self.half, self.odd, self.short = length // 2, length // 2 - 1, SHORT
        rng = np.random.default_rng(seed)
        self.x, self.other = rng.normal(size=(2, BATCH, length, d_model)).astype(np.float32)
        self.reset = rng.random((BATCH, length)) < 0.08
        self.reset[:, [0, self.half, -1]] = [[False, True, False], [False, False, True]]
        self.prefix = self.mixer.prefix
        self.traces = collections.Counter()
        self._forward = compiled(self._traced)
        self._empty = compiled(lambda batch: self.mixer.init_state(batch), static_argnums=0)

    def run(self, x, state=None, reset=None) -> Results:
        """mixer(x, state, reset=reset), compiled once for each shape and dtype of x."""
        state = self.empty(len(x)) if state is None else state
        reset = np.zeros(x.shape[:2], bool) if reset is None else reset
        return self._forward(self.mixer, x, state, reset)

    def shapes(self, x, state, reset) -> Results:
        """Shapes and dtypes of what `run` returns; it need not be compiled for that."""
        return self._forward.eval_shape(self.mixer, x, state, reset)

    def legal(self, cut: int) -> int:
        """The first place from token `cut` on where a call may end: in no document's prefix."""
        begun = np.maximum.accumulate(np.where(self.reset, np.arange(self.length), -self.odd), 1)
        inside = np.arange(self.length) - begun < self.prefix
        places = np.append((self.reset | ~inside).all(0), True)
        return cut + int(places[cut:].argmax())

    @functools.cached_property
    def stepped(self) -> np.ndarray:
        """[B, T] resets under which any token may come in a call of its own: `reset`, or with a
        prefix documents of one token, after one that is beyond it."""
        alone = np.arange(self.length) >= self.length - SHORT
        return np.broadcast_to(alone, self.reset.shape) if self.prefix else self.reset

    def _traced(self, mixer, x, state, reset):
        self.traces[x.shape, x.dtype.name] += 1
        return whole(mixer, x, state, reset)

    def empty(self, batch: int = BATCH):
        return self._empty(batch)

    def bytes_per_sequence(self) -> int:
        """Of the state, for the config as it was given."""
        empty = lambda: self.given.build(self.d_model, rngs=nnx.Rngs(0)).init_state(1)
        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(empty))
        )

    @functools.cached_property
    def state(self):
        return self.run(self.other[:, : self.odd]).state

    @functools.cached_property
    def gradients(self) -> Callable:
        """`gradients_of` the mixer itself, compiled: on one device, in float32."""
        return compiled(gradients_of(whole))

    @functools.cached_property
    def weights(self) -> dict:
        """Of the loss: a random number for every output, so that none of them can hide."""
        rng = np.random.default_rng(1)
        results = jax.eval_shape(whole, self.mixer, self.x, self.empty(), self.reset)
        return {
            name: rng.normal(size=leaf.shape).astype(np.float32)
            for name, leaf in floating(named(results)).items()
        }


def whole(mixer, x, state, reset) -> Results:
    """The mixer over all tokens at once."""
    return Results(*mixer(x, state, reset=reset))


def step_by_step(mixer, x, state, reset) -> Results:
    """The mixer token by token: the form that kernels define, and everything else must equal."""

    def step(state, token):
        x, reset = token
        y, after = mixer(x[:, None], state, reset=reset[:, None])
        return jax.tree.map(lambda new, old: new.astype(old.dtype), after, state), y[:, 0]

    state, y = jax.lax.scan(step, state, (jnp.moveaxis(x, 1, 0), reset.T))
    return Results(jnp.moveaxis(y, 0, 1), state)


def gradients_of(run: Callable) -> Callable:
    """f(mixer, x, state, reset, weights) -> (results, gradients by name), for a way to run mixers.

    The loss is the weighted sum of y and of the final state. Integers and booleans, wherever they
    are, get no gradient.
    """

    def loss(inputs, reset, weights):
        results = run(inputs["parameters"], inputs["x"], inputs["initial state"], reset)
        ends = floating(named(results))
        return sum(jnp.vdot(weights[name], end) for name, end in ends.items()), results

    def f(mixer, x, state, reset, weights):
        inputs = {"parameters": mixer, "x": x, "initial state": state}
        gradients, results = jax.grad(loss, has_aux=True, allow_int=True)(inputs, reset, weights)
        return results, floating(named(gradients))

    return f


def floating(leaves: dict) -> dict:
    """Those leaves that are real numbers."""
    return {k: v for k, v in leaves.items() if jnp.issubdtype(v.dtype, jnp.floating)}


def _build(config, d_model: int):
    try:
        return compiled(lambda: config.build(d_model, rngs=nnx.Rngs(0)))()
    except SeqlabError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The mixer cannot be built with d_model={d_model}: {one_line(error)}."
        ) from error


def _stirred(mixer, seed: int):
    rng = np.random.default_rng(seed)

    def stir(a):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        return np.asarray(a) + (NOISE * rng.normal(size=a.shape)).astype(a.dtype)

    return jax.tree.map(stir, mixer)


def _exercised(config, length: int) -> tuple[Any, list[str]]:
    """The config with chunks and windows shorter than the trial, and what changed."""
    changes = {}
    for name, size in {"chunk_size": 16, "window": 12}.items():
        if getattr(config, name, None) is not None and getattr(config, name) >= length:
            changes[name] = size
    if getattr(config, "prefix_len", 0) > SHORT:
        changes["prefix_len"] = SHORT
    if getattr(config, "max_length", None) is not None:
        changes["max_length"] = 2 * length
    said = [f"{name}={value}" for name, value in changes.items()]
    return (dataclasses.replace(config, **changes) if changes else config), said


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line it says."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
