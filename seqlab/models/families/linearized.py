"""Linearized models: those of any family here, with other mixers in the place of attention.

A file is its family's, but for `model_type` and `architectures`, so that nobody runs attention with
these weights unawares, and for `seqlab` in config.json, which holds what these two were and the
model's own config. Weights that are as they were have the family's names; others of a layer are
`self_attn.NAME`, by their names in the mixer that is there now.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from seqlab import settings
from seqlab.errors import ModelError, SeqlabError
from seqlab.models import decoder, hf_config, lm, pretrained
from seqlab.models.block import BlockConfig
from seqlab.models.essence import essence
from seqlab.models.parameters import parameters
from seqlab.models.rearrange import Rule, reshape, rule

MODEL_TYPES = ("seqlab_linearized",)
ENTRY = "seqlab"  # of config.json
KIND = ("model_type", "architectures", "auto_map")  # what says who runs a model

PLACE = re.compile(r"(before|blocks|after)\.\d+\.")  # of a layer in our names
LAYER = re.compile(r".*?\.\d+\.")  # and in those of a family

#: Weights of a layer that are published under other names than their own.
RENAMED = [
    rule(f"mixer.memory.feature_map_{x}.project.{part}", f"self_attn.feature_map_{x}.{part}")
    for x in "qk"
    for part in ("weight", "bias")
] + [
    rule("mixer.memory.decay.weight", "self_attn.gate.weight", reshape((-1,), (-1, 1))),
    rule("mixer.memory.decay.bias", "self_attn.gate.bias", reshape((), (1,))),
]


def config(fields: hf_config.Fields, tensors: decoder.Tensors) -> lm.Config:
    plain = _entry(fields)["model"]
    found = settings.read(lm.Config, plain, f"{ENTRY}.model of {hf_config.CONFIG}")
    return found if fields.max_length is None else _with_room(found, fields.max_length)


def rules(config: lm.Config) -> list[Rule]:
    """The family's rules for all weights that are shaped as they were, and our own for others."""
    family, original = _original(config)
    old, new, places = _weights(original), _weights(config), _places(config)
    found, named, layers = [], set(), {}
    for n, one in _by_layer(family.rules(original), original):
        if layer := LAYER.match(one.theirs[0]):
            layers[n] = layer[0]
        weights = [(n, name) for name in one.ours]
        if all(w in new and new[w] == old.get(w) for w in weights):
            ours, repeat = places[n]
            found.append(decoder.within(one, ours, "", repeat))
            named.update(weights)
    for n, name in new:
        if n is not None and (n, name) not in named:
            ours, repeat = places[n]
            found.append(decoder.within(_own(name), ours, layers.get(n, ours), repeat))
    return found


def described(config: lm.Config) -> dict[str, Any] | None:
    """config.json of a model that was read from a published checkpoint and has other mixers now;
    None if it has those it had."""
    if config.published is None:
        return None
    with contextlib.suppress(SeqlabError):  # of other families, not all can be told from the fields
        mixers = lambda one: [layer["mixer"] for layer in essence(one)[1]]
        if mixers(config) != mixers(_original(config)[1]):
            return _described(config)
    return None


def _described(config: lm.Config) -> dict[str, Any]:
    raw = _original_fields(config)
    plain = {name: value for name, value in settings.plain(config).items() if name != "published"}
    return {
        **{name: value for name, value in raw.items() if name not in KIND},
        "model_type": MODEL_TYPES[0],
        "architectures": ["SeqlabLinearizedForCausalLM"],
        ENTRY: {"base": {name: raw[name] for name in KIND if name in raw}, "model": plain},
    }


def _original(config: lm.Config) -> tuple[ModuleType, lm.Config]:
    """The family of a model, and the config with which it was read."""
    raw = _original_fields(config) | {"tie_word_embeddings": config.tie_embeddings}
    family = pretrained.family_of(raw.get("model_type"), hf_config.CONFIG)
    fields = hf_config.normalised(raw)
    original = pretrained.config_of(family, fields, decoder.UNREAD, hf_config.CONFIG)
    depths = [len(decoder.places(one)) for one in (original, config)]
    if depths[0] != depths[1]:
        raise ModelError(
            f"{hf_config.CONFIG} is of {depths[0]} layers, and {ENTRY}.model in it of {depths[1]}: "
            "restore the file."
        )
    return family, original


def _original_fields(config: lm.Config) -> dict[str, Any]:
    """config.json of the model as its family has it."""
    raw = json.loads(config.published or "{}")
    if raw.get("model_type") not in MODEL_TYPES:
        return raw
    rest = {name: value for name, value in raw.items() if name not in (ENTRY, *KIND)}
    return rest | _entry(raw)["base"]


def _entry(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    entry = fields.get(ENTRY)
    is_whole = lambda e: all(isinstance(e.get(part), Mapping) for part in ("base", "model"))
    if not isinstance(entry, Mapping) or not is_whole(entry):
        raise ModelError(
            f"{hf_config.CONFIG} lacks {ENTRY!r} with base and model, which every linearized model "
            "has: restore the file."
        )
    return entry


def _places(config: lm.Config) -> dict[int | None, tuple[str, int | None]]:
    """What our names of a layer's weights begin with, and its repeat; by None what is in none."""
    places = enumerate(decoder.places(config))
    return {None: ("", None)} | {n: (ours, repeat) for n, (ours, repeat, _) in places}


def _weights(config: lm.Config) -> dict[tuple[int | None, str], tuple[int, ...]]:
    """The shape of every weight, by its layer and its name within it."""
    like, within = parameters(config.skeleton()), _places(config)
    return {
        (n, name.removeprefix(ours)): array.shape[repeat is not None :]
        for n, (ours, repeat) in within.items()
        for name, array in like.items()
        if name.startswith(ours) and (n is None) != bool(PLACE.match(name))
    }


def _by_layer(rules: Iterable[Rule], config: lm.Config) -> Iterator[tuple[int | None, Rule]]:
    """Each rule of a model with the layer that it is of, by names within that."""
    layer = {place: n for n, place in _places(config).items()}
    for one in rules:
        place = PLACE.match(one.ours[0])
        ours = place[0] if place else ""
        inner = tuple(name.removeprefix(ours) for name in one.ours)
        yield layer[ours, one.repeat], one._replace(ours=inner)


def _own(name: str) -> Rule:
    """The rule of a weight within a layer that the family has no name for."""
    usual = rule(name, re.sub(r"^mixer\.", "self_attn.", name))
    return next((one for one in RENAMED if one.ours == usual.ours), usual)


def _with_room(config: lm.Config, max_length: int) -> lm.Config:
    """The same with this `max_length` of softmax attention without a window, and of rotations that
    depend on it."""

    def longer(entry: BlockConfig) -> BlockConfig:
        one, changes = config.block(entry), {}
        mixer: Any = one.mixer
        scaling: Any = getattr(mixer, "rope_scaling", None)
        if getattr(mixer, "max_length", None) and getattr(mixer, "window", 0) is None:
            changes["max_length"] = max_length
        if getattr(scaling, "max_length", None):
            changes["rope_scaling"] = dataclasses.replace(scaling, max_length=max_length)
        mixer = dataclasses.replace(mixer, **changes) if changes else mixer
        return dataclasses.replace(one, mixer=mixer)

    lies = ("before", "pattern", "after")
    return dataclasses.replace(config, **{n: tuple(map(longer, getattr(config, n))) for n in lies})
