"""What a mixer takes over of the softmax attention whose place it takes: the projections.

A weight that stays as it is stays the same buffer. Others are made of the teacher's columns: keys
and values that a group of heads shares are repeated for mixers that know no groups, and maps that
are one in the new mixer (its qkv, say) are joined. A mixer says in `Mixer.projections` which of its
maps these are.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqlab.errors import ModelError
from seqlab.layers.mixer import Mixer
from seqlab.models.parameters import parameters

#: The projections of softmax attention, and those of its parts that are carried over by name alone.
ROLES, NORMS = ("q", "k", "v", "out"), ("q_norm", "k_norm")


class Part(NamedTuple):
    """A stretch of one of the teacher's weights, along the axis that belongs to the heads."""

    name: str
    begin: int = 0
    end: int | None = None
    times: int = 1  # each head of width head_dim stands so often


class Source(NamedTuple):
    """What a weight is made of: stretches along an axis, joined there. An axis None is a weight
    that stays as it is."""

    parts: tuple[Part, ...]
    axis: int | None = None
    head_dim: int = 0

    def array(self, held: Mapping[str, jax.Array]) -> jax.Array:
        """The weight, from the teacher's; where it stays as it is, the very same array."""
        arrays = tuple(held[part.name] for part in self.parts)
        return arrays[0] if self.axis is None else _joined(self, arrays)

    def cut(self, array: jax.Array, part: Part) -> jax.Array:
        """One stretch of one of the teacher's weights."""
        last = jnp.moveaxis(array, self.axis or -1, -1)
        if part.times > 1:
            by_head = last.reshape(*last.shape[:-1], -1, self.head_dim)
            last = jnp.repeat(by_head, part.times, -2).reshape(*last.shape[:-1], -1)
        return jnp.moveaxis(last[..., part.begin : part.end], -1, self.axis or -1)

    def under(self, prefix: str) -> "Source":
        """The same where the teacher's names begin with a prefix."""
        return self._replace(parts=tuple(p._replace(name=prefix + p.name) for p in self.parts))


@functools.partial(jax.jit, static_argnums=0)
def _joined(source: Source, arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Compiled, so that the stretches are never arrays."""
    parts = zip(arrays, source.parts, strict=True)
    return jnp.concatenate([source.cut(array, part) for array, part in parts], source.axis)


def sources(old: Any, new: Mixer, name: str) -> dict[str, Source]:
    """Weight of the new mixer -> what it is made of, for every weight that is carried over.

    old   softmax attention, whose weights may be abstract, and may be stacked over depth
    new   the mixer called `name`, likewise

    Raises ModelError where a map has no room for the projection that it is to take over.
    """
    theirs, ours = parameters(old), parameters(new)
    maps, found = _maps(new, name), {}
    times = {role: _times(old, maps, role, name) for role in ROLES}
    used = dict.fromkeys(ROLES, 0)
    for at, parts in maps.items():
        taken = []
        for role, width in parts:
            taken.append((role, Part("", used[role], used[role] + width, times[role])))
            used[role] += width
        for kind in ("weight", "bias"):
            made = _made(old, taken, kind)
            if f"{at}.{kind}" in ours and all(part.name in theirs for part in made.parts):
                found[f"{at}.{kind}"] = made
    alike = lambda n: n in theirs and theirs[n].shape == ours[n].shape
    same = lambda n: type(old) is type(new) or n.split(".")[0] in _unchanged(found)
    return {n: Source((Part(n),)) for n in ours if alike(n) and same(n)} | found


def _maps(new: Mixer, name: str) -> dict[str, tuple[tuple[str, int], ...]]:
    """All of a mixer's maps that take over projections: those it declares, and those by name."""
    maps = {}
    for at, parts in (dict.fromkeys(ROLES) | dict(new.projections)).items():
        weight = getattr(getattr(new, at, None), "weight", None)
        if weight is None or len(weight.get_metadata()["axes"]) != 2:
            continue
        parts = parts or ((at, None),)
        size = weight.shape[_axis(parts)]
        maps[at] = tuple((role, size if width is None else width) for role, width in parts)
        if sum(width for _, width in maps[at]) != size:
            raise ModelError(
                f"{name} says of its {at}, which is {size} wide, that it is made of {maps[at]}: "
                "mend its projections."
            )
    read = any("v" in dict(parts) for parts in maps.values())  # out reads values, and no others
    return {at: parts for at, parts in maps.items() if read or "out" not in dict(parts)}


def _times(old: Any, maps: Mapping, role: str, name: str) -> int:
    """How often each head of a projection stands in the new mixer's maps for it."""
    K, held = old.head_dim, old.kv_heads if role in ("k", "v") else old.config.heads
    mine = [at for at, parts in maps.items() if role in dict(parts)]
    wide = sum(n for at in mine for r, n in maps[at] if r == role)
    if wide in (0, held * K):
        return 1
    if role in ("k", "v") and wide % (held * K) == 0 and old.config.heads * K % wide == 0:
        return wide // (held * K)
    needed = f"{held * K}, or {old.config.heads * K}" if role in ("k", "v") else f"{held * K}"
    raise ModelError(
        f"{name} cannot take over the teacher's {role} of {held} heads of {K}, which is "
        f"{held * K} wide: its {mine[0]} has {wide} for it and needs {needed}, so give it other "
        "fields or take another mixer."
    )


def _made(old: Any, taken: list[tuple[str, Part]], kind: str) -> Source:
    axis = _axis(taken)
    parts = tuple(part._replace(name=f"{role}.{kind}") for role, part in taken)
    whole = getattr(old, taken[0][0]).weight.shape[axis]
    one = len(parts) == 1 and parts[0].times == 1 and parts[0].end == whole
    if one or (axis == -2 and kind == "bias"):
        return Source((Part(parts[0].name),))
    return Source(parts, axis, old.head_dim)


def _axis(parts) -> int:
    """Which axis of a map's weight belongs to the heads."""
    return -2 if parts[0][0] == "out" else -1


def _unchanged(found: Mapping[str, Source]) -> set[str]:
    """What is carried over by name, whatever is in it: norms of q and k, and maps that stay."""
    stay = {at.split(".")[0] for at, s in found.items() if s.axis is None}
    return {*NORMS, *(at for at in stay if found[f"{at}.weight"].parts[0].name == f"{at}.weight")}
