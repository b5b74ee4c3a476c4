"""A recurrence over time, and every way we know to run it.

The decorated function is the definition: a plain scan that a reader can hold against the paper.
Faster implementations are attached to it and must agree with it. From a `transition` (what a
stretch of tokens does to a state) the recurrence gets sequence parallelism; without one it still
shards, exactly, but takes as many steps as on one device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqlab.errors import ConfigError, nearest
from seqlab.parallel import sequence
from seqlab.parallel.mesh import current_travel
from seqlab.parallel.relay import relay

PLATFORM = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}

#: Every recurrence by name; `seqlab doctor` lists which implementation each takes here.
RECURRENCES: dict[str, "Recurrence"] = {}


class Recurrence:
    """f(*tokens, *weights, state, implementation=None, **options) -> (y, state).

    tokens are [B, T, ...] with any T >= 1, state is [B, ...], weights (`weights` says how many) are
    [heads, ...] and the same for all tokens; it runs on any mesh. `implementation` None takes the
    best for the platform that the program is lowered for; a name takes that one. A single token
    takes the definition, which is its fastest form.
    """

    __name__: str  # the definition's

    def __init__(
        self, reference: Callable, implementations: dict, transition, apart, weights: int, best
    ):
        functools.update_wrapper(self, reference)
        self.implementations = {"reference": reference, **implementations}
        self.best = best
        self.transition, self.apart, self.weights = transition, apart, weights
        RECURRENCES[reference.__name__] = self

    def __call__(self, *args, implementation: str | None = None, **options):
        *tokens, state = args
        cut = len(tokens) - self.weights
        tokens, weights = tuple(tokens[:cut]), tuple(tokens[cut:])
        if jax.tree.leaves(tokens)[0].shape[1] == 1:
            implementation = "reference"
        run = functools.partial(self._run, implementation, options)

        def shard(*args):
            if self.transition is None:
                return relay(run, args[:cut], args[cut:-1], args[-1])
            *tokens, state = args
            stretch, travel = self.transition(*tokens, **options), current_travel()
            hops = sequence.hops(stretch, state, travel)
            if hops and self.apart is not None and implementation in (None, "xla"):
                nothing = jax.tree.map(jnp.zeros_like, stretch.update)
                apart = self.apart(hops, *tokens, nothing, **options)
                if apart is not None:
                    (entering, leaving, results) = sequence.enter_beside(
                        stretch, state, travel, apart.work, apart.operands
                    )
                    return apart.finish(results, entering), leaving
            entering, leaving = sequence.enter(stretch, state, travel)
            return run(*tokens, entering)[0], leaving

        return sequence.on_mesh(run, shard, tokens, state, weights)

    def implementation_on(self, platform: str) -> str:
        """The name of the implementation that `None` means on "cpu", "tpu" or "cuda"."""
        chosen = [name for name in self.implementations if PLATFORM.get(name) == platform]
        return (chosen or [name for name in ("xla", "reference") if name in self.implementations])[
            0
        ]

    def _run(self, implementation, options, *args):
        bound = {name: functools.partial(f, **options) for name, f in self.implementations.items()}
        if implementation is not None:
            if implementation not in bound:
                raise ConfigError(
                    f"{self.__name__} has no implementation {implementation!r}: "
                    + nearest(implementation, bound)
                )
            return bound[implementation](*args)
        if self.best is not None:
            return self.best(*args, **options)
        # resolved when lowering, so that compiling ahead of time for another platform is right too
        default = bound[self.implementation_on("cpu")]
        by_platform = {PLATFORM[name]: f for name, f in bound.items() if name in PLATFORM}
        return jax.lax.platform_dependent(*args, default=default, **by_platform)


def recurrence(
    transition: Callable | None = None,
    apart: Callable | None = None,
    weights: int = 0,
    best: Callable | None = None,
    **implementations: Callable,
) -> Callable[[Callable], Recurrence]:
    """Decorate a definition `f(*tokens, *weights, state, **options)` with its transition and faster
    forms; `weights` is how many arguments are weights.

    apart(hops, *tokens, *weights, zeros, **options) gives the work that can be done before the
    state that enters is known (a `chunk_scan.Apart`), for as many steps as a state makes hops; None
    where tokens are too few. `best` runs what `implementation` None means, where its forms on all
    platforms share one gradient (see `platforms`).
    """
    return lambda reference: Recurrence(
        reference, implementations, transition, apart, weights, best
    )
