"""Softmax attention out, another mixer in: teacher and student share every other weight."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from seqlab.errors import ConfigError, ModelError
from seqlab.layers import registry
from seqlab.layers.registry import MixerConfig
from seqlab.linearize import carry
from seqlab.models import block as blocks
from seqlab.models import export, layout, lm
from seqlab.models.parameters import axes, bind, parameters
from seqlab.parallel.mesh import placed, weight_shardings

ATTENTION = "attention"  # the mixer that is replaced

#: From the Config of a layer's softmax attention, with kv_heads and head_dim written out, to that
#: of the mixer that is to take its place.
Target = Callable[[Any], MixerConfig]


class Plan(NamedTuple):
    """A swap before any weight is touched.

    teacher   the teacher's config, which stacks no layers that are to differ
    student   lies like it over depth
    replaced  which layers have another mixer, counted from 0
    carried   weight of those mixers -> what it is made of
    extra     the other weights of those mixers, which start anew
    left      weights of the teacher's attention that have no place in the student
    """

    teacher: lm.Config
    student: lm.Config
    replaced: tuple[int, ...]
    carried: Mapping[str, carry.Source]
    extra: frozenset[str]
    left: frozenset[str]


class Pair(NamedTuple):
    """A teacher and its student, both of one layout: weights of the same name that the swap left as
    they were are the same buffers. The rest is as in `Plan`; what is `extra` is float32."""

    teacher: lm.LM
    student: lm.LM
    replaced: tuple[int, ...]
    extra: frozenset[str]
    left: frozenset[str] = frozenset()


def swap(teacher: lm.LM, target: Target, *, keep: Collection[int] = (), rngs: nnx.Rngs) -> Pair:
    """A student with `target(attention)` in the place of each layer of full softmax attention.

    Layers with a window of their own, layers without attention, and those in `keep` stay as they
    are. New weights start as their mixer has it, on the devices of the ambient mesh. Where the
    teacher stacks layers that are now to differ, it is laid out anew, and its layers are held twice
    until the given model is let go; one that was loaded with
    `layout=lambda config: plan(config, target, keep=keep).teacher` lies right already.

    Raises what `plan` does.
    """
    made = plan(teacher.config, target, keep=keep)
    teacher = layout.relaid(teacher, made.teacher)
    skeleton, held = made.student.skeleton(), parameters(teacher)
    named = axes(skeleton)
    fresh = _fresh(made.student, sorted(made.extra), named, rngs)
    params = {
        name: fresh[name] if name in fresh else _carried(name, made.carried, held, axes)
        for name, axes in named.items()
    }
    return Pair(teacher, bind(skeleton, params), made.replaced, made.extra, made.left)


def plan(config: lm.Config, target: Target, *, keep: Collection[int] = ()) -> Plan:
    """What `swap` would do to a teacher of this config.

    Raises ConfigError for layers in `keep` that there are not, and ModelError where nothing is left
    to replace, or the new mixer cannot take over a projection.
    """
    old = layout.layers(config)
    replaced = _replaced(old, keep)
    new = [
        dataclasses.replace(one, mixer=target(written_out(one.mixer, config.d_model)))
        if n in replaced
        else one
        for n, one in enumerate(old)
    ]
    teacher = layout.fitting(config, new)
    student = layout.with_layers(_published(teacher), new)
    carried, extra, left = _weights(teacher.skeleton(), student.skeleton())
    return Plan(teacher, student, replaced, carried, extra, left)


def _published(config: lm.Config) -> lm.Config:
    """The config with the config.json of its family, by which a student is exported."""
    fields = export.fields_of(config)
    return dataclasses.replace(config, published=fields and json.dumps(fields))


def written_out(attention: Any, d_model: int) -> Any:
    """The attention's Config with every size in it."""
    sizes = {
        "kv_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim or d_model // attention.heads,
    }
    return dataclasses.replace(attention, **sizes)


def is_replaceable(one: blocks.Config) -> bool:
    """Whether a block mixes with softmax attention over all that came before."""
    mixer = one.mixer
    return mixer is not None and registry.mixer_name(mixer) == ATTENTION and mixer.window is None


def _replaced(old: list[blocks.Config], keep: Collection[int]) -> tuple[int, ...]:
    unknown = sorted(set(keep) - set(range(len(old))))
    if unknown:
        raise ConfigError(
            f"There is no layer {unknown[0]} to keep: the model has {len(old)}, counted from 0."
        )
    able = [n for n, one in enumerate(old) if is_replaceable(one)]
    if not able:
        raise ModelError(
            "The model has no layer of full softmax attention, so there is nothing to linearize: "
            "give a transformer."
        )
    if set(able) <= set(keep):
        raise ConfigError(
            f"All {len(able)} layers of full softmax attention are kept, so nothing would change: "
            "keep fewer."
        )
    return tuple(n for n in able if n not in keep)


def _weights(
    teacher: lm.LM, student: lm.LM
) -> tuple[dict[str, carry.Source], frozenset[str], frozenset[str]]:
    """Plan's carried, extra and left, of two models that may be abstract."""
    carried: dict[str, carry.Source] = {}
    extra, left = set(), set()
    for name in ("before", "blocks", "after"):
        pairs = zip(getattr(teacher, name), getattr(student, name), strict=True)
        for i, (old, new) in enumerate(pairs):
            if old.config.mixer == new.config.mixer:
                continue
            inside = f"{name}.{i}.mixer."
            found = carry.sources(old.mixer, new.mixer, registry.mixer_name(new.config.mixer))
            taken = {part.name for source in found.values() for part in source.parts}
            carried |= {inside + n: source.under(inside) for n, source in found.items()}
            extra |= {inside + n for n in parameters(new.mixer) if n not in found}
            left |= {inside + n for n in parameters(old.mixer) if n not in taken}
    return carried, frozenset(extra), frozenset(left)


def _carried(name: str, carried: Mapping[str, carry.Source], held, axes) -> jax.Array:
    """A weight that the teacher has, or has the making of; where it can be, the very same array."""
    source = carried.get(name, carry.Source((carry.Part(name),)))
    array = source.array(held)
    return array if source.axis is None else placed(array, axes)


def _fresh(config: lm.Config, names: Collection[str], axes, rngs: nnx.Rngs) -> dict[str, jax.Array]:
    """Weights of a new model; nothing else of it is ever made."""

    def make(key):
        params = parameters(config.build(rngs=nnx.Rngs(key)))
        return {name: params[name] for name in names}

    mesh, shapes = jax.sharding.get_mesh(), parameters(config.skeleton())
    shapes = {name: shapes[name].shape for name in names}
    where = None if mesh.empty else weight_shardings(shapes, axes, mesh)
    return jax.jit(make, out_shardings=where)(rngs.params())
