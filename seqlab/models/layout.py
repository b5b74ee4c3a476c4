"""How a model's layers lie over depth, and the same model with its layers lying otherwise.

Layers that are alike may lie in one stack of arrays, which a scan runs through. Where some of them
are to become something else, their stack has to be taken apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp

from seqlab.models import block as blocks
from seqlab.models import decoder, lm
from seqlab.models.parameters import axes, bind, parameters
from seqlab.parallel.mesh import placed

#: From the config of a model as it was saved to that of the same model lying as it is wanted.
Layout = Callable[[lm.Config], lm.Config]


def layers(config: lm.Config) -> list[blocks.Config]:
    """The blocks of a model, one by one from the first."""
    return [block for _, _, block in decoder.places(config)]


def fitting(config: lm.Config, kinds: Sequence[Hashable]) -> lm.Config:
    """A config of the same layers that stacks none of different kinds; itself, if it does not.

    `kinds` has one entry a layer.
    """
    if all(len({kinds[n] for n in stack}) == 1 for stack in stacks(config)):
        return config
    parts = decoder.fold(list(zip(layers(config), kinds, strict=True)))
    own = lambda pairs: tuple(block for block, _ in pairs)
    before, pattern, repeats, after = parts
    lies = {"before": own(before), "pattern": own(pattern), "after": own(after)}
    return dataclasses.replace(config, **lies, repeats=repeats)


def with_layers(config: lm.Config, new: Sequence[blocks.Config]) -> lm.Config:
    """A config that lies like this one and has other layers; those of a stack must be alike."""
    entries = iter([new[stack[0]] for stack in stacks(config)])
    names = ("before", "pattern", "after")
    lies = {name: tuple(next(entries) for _ in getattr(config, name)) for name in names}
    return dataclasses.replace(config, **lies)


def stacks(config: lm.Config) -> list[list[int]]:
    """Which layers lie in each entry of before, pattern and after."""
    found: dict[str, list[int]] = {}
    for n, (ours, _, _) in enumerate(decoder.places(config)):
        found.setdefault(ours, []).append(n)
    return list(found.values())


def relaid(model: lm.LM, config: lm.Config) -> lm.LM:
    """The same model lying as `config` has it. Weights that lie alike in both are the same buffers;
    the others are stacked anew, and go where the ambient mesh says."""
    if config == model.config:
        return model
    return bind(config.skeleton(), restacked(parameters(model), model.config, config))


def restacked(held: dict[str, jax.Array], old: lm.Config, new: lm.Config) -> dict[str, jax.Array]:
    """The weights of a model that lies as `old`, for the same model lying as `new`.

    They are taken out of `held`: where nothing else holds them, no more than one weight of all
    layers is held twice at any time.
    """
    named, made = axes(new.skeleton()), {}
    sources = _sources(old, new)
    inner: dict[str, list[str]] = {}  # by what they are called within a layer
    for name in named:
        ours = _layer_of(name, sources)
        inner.setdefault(name.removeprefix(ours), []).append(ours)
    for rest, places in inner.items():
        for ours in places:
            parts = [(held[theirs + rest], repeat) for theirs, repeat in sources[ours]]
            stack = ours.startswith("blocks.")
            made[ours + rest] = _stacked(parts, stack, named[ours + rest])
        for theirs in {theirs for ours in places for theirs, _ in sources[ours]}:
            del held[theirs + rest]
    return made


def _sources(old: lm.Config, new: lm.Config) -> dict[str, list[tuple[str, int | None]]]:
    """For each place of the new layout, the old places of its layers; "" is what is in none."""
    found: dict[str, list[tuple[str, int | None]]] = {"": [("", None)]}
    for (theirs, repeat, _), (ours, _, _) in zip(
        decoder.places(old), decoder.places(new), strict=True
    ):
        found.setdefault(ours, []).append((theirs, repeat))
    return found


def _layer_of(name: str, places) -> str:
    return next((place for place in places if place and name.startswith(place)), "")


def _stacked(parts: list[tuple[jax.Array, int | None]], stack: bool, axes) -> jax.Array:
    """One weight from its slices, which is one of the old arrays where it can be."""
    array, repeat = parts[0]
    every = [(array, r) for r in range(len(array))] if stack else [(array, None)]
    if len(parts) == len(every) and all(
        a is b and r == s for (a, r), (b, s) in zip(parts, every, strict=True)
    ):
        return array
    arrays, repeats = zip(*parts, strict=True)
    return placed(_cut(arrays, repeats, stack), axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut(arrays, repeats, stack: bool) -> jax.Array:
    """Slices of arrays, stacked or alone; compiled, so that the slices are never arrays."""
    cut = [a if r is None else a[r] for a, r in zip(arrays, repeats, strict=True)]
    return jnp.stack(cut) if stack else cut[0]
