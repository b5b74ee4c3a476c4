"""What published decoders have in common: how their layers become blocks, and the names of ours.

The files of `seqlab.models.families` are written with this.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from seqlab.errors import ModelError
from seqlab.models import block as blocks
from seqlab.models import lm
from seqlab.models.hf_config import Fields
from seqlab.models.rearrange import Rule, linear, norm, rule

T = TypeVar("T")
Tensors = Mapping[str, np.ndarray]

#: Stands for tensors that are not at hand: what config.json says of sizes is then believed.
UNREAD: Tensors = MappingProxyType({})

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER, NORM = "model.layers.{}.", "model.norm"


def config(
    fields: Fields,
    tensors: Tensors,
    layers: Callable[[int], blocks.Config],
    *,
    embed: str = EMBED,
    head: str = HEAD,
    layer: str = LAYER,
    before: tuple[blocks.Config, ...] = (),
    **more: Any,
) -> lm.Config:
    """The model whose layer n is the block `layers(n)`.

    Vocabulary, width and depth are those of the tensors. Blocks `before` stand in front of all
    layers. `more` goes into the model's config.
    """
    vocab, d_model = size(tensors, embed, fields)
    n = depth(fields, tensors, layer)
    first, pattern, repeats, after = fold([layers(i) for i in range(n)])
    return lm.Config(
        vocab=vocab,
        d_model=d_model,
        before=(*before, *first),
        pattern=pattern,
        repeats=repeats,
        after=after,
        tie_embeddings=fields.get("tie_word_embeddings", head not in tensors),
        ffn=None,
        **more,
    )


def rules(
    config: lm.Config,
    layers: Callable[[blocks.Config], Iterable[Rule]],
    *,
    embed: str = EMBED,
    head: str = HEAD,
    layer: str = LAYER,
    final: str = NORM,
    before: int = 0,
) -> list[Rule]:
    """Every rule of a model, but of as many blocks as stand `before` its layers: `layers(block)`
    gives those of a block, by names within it."""
    found = [
        rule("embed.weight", embed),
        *norm("norm", final),
        *linear("head", head.removesuffix(".weight")),
    ]
    for n, (ours, repeat, block) in enumerate(places(config)[before:]):
        theirs = layer.format(n)
        for one in layers(block):
            found.append(within(one, ours, theirs, repeat))
    return found


def within(one: Rule, ours: str, theirs: str, repeat: int | None) -> Rule:
    """The rule of a layer, whose names are those within it, as a rule of the model."""
    return one._replace(
        ours=tuple(ours + name for name in one.ours),
        theirs=tuple(theirs + name for name in one.theirs),
        repeat=repeat,
    )


def places(config: lm.Config) -> list[tuple[str, int | None, blocks.Config]]:
    """Where each layer is, from the first: its prefix in our names, its repeat, its block."""
    single = lambda name, entries: [
        (f"{name}.{i}.", None, config.block(entry)) for i, entry in enumerate(entries)
    ]
    period = single("blocks", config.pattern)
    return [
        *single("before", config.before),
        *((ours, r, block) for r in range(config.repeats) for ours, _, block in period),
        *single("after", config.after),
    ]


def size(tensors: Tensors, name: str, fields: Fields) -> tuple[int, int]:
    """The shape of the embedding; raises ModelError where config.json has another."""
    if tensors is UNREAD:
        return fields["vocab_size"], fields["hidden_size"]
    shape = tensors[name].shape if name in tensors else ()
    stated = [fields.get(field) for field in ("vocab_size", "hidden_size")]
    if len(shape) != 2 or any(s not in (None, n) for s, n in zip(stated, shape, strict=True)):
        raise ModelError(
            f"{name} is {list(shape) or 'absent'}, which does not fit vocab_size={stated[0]} and "
            f"hidden_size={stated[1]} of config.json: they are of two models."
        )
    return shape


def depth(fields: Fields, tensors: Tensors, layer: str = LAYER) -> int:
    """How many layers there are; raises ModelError where config.json has another number."""
    if tensors is UNREAD:
        return fields["num_hidden_layers"]
    pattern = re.compile(re.escape(layer).replace(r"\{\}", r"(\d{1,6})"))
    found = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    stated = fields.get("num_hidden_layers", len(found))
    if stated != len(found) or found != set(range(len(found))) or not found:
        raise ModelError(
            f"config.json has {stated} layers and the tensors have {len(found)}: "
            "they are of two models, or some files are missing."
        )
    return len(found)


def fold(layers: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...], int, tuple[T, ...]]:
    """before, pattern, repeats, after: the fewest blocks that are these layers when unfolded.

    What compiles is each of these blocks once, so programs stay as small as the pattern allows.
    """
    kinds = list(dict.fromkeys(layers))
    ids, n = np.array([kinds.index(layer) for layer in layers]), len(layers)
    best = (n, 0, n, 1)  # blocks, before, length of the pattern, repeats
    for period in range(1, n):
        run = 0  # of places from i on, each with its like one period later
        for i in reversed(range(n - period)):
            run = run + 1 if ids[i] == ids[i + period] else 0
            repeats = 1 + run // period
            if repeats > 1:
                best = min(best, (n - (repeats - 1) * period, i, period, repeats))
    _, start, period, repeats = best
    end = start + period * repeats
    cut = tuple(layers)
    return cut[:start], cut[start : start + period], repeats, cut[end:]
