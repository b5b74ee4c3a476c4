"""A family's rules put to work: their tensors become our weights, and our weights theirs."""

import collections
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.errors import ModelError
from seqlab.models import lm
from seqlab.models.parameters import axes, decays, largest_first, parameters
from seqlab.models.rearrange import Rule
from seqlab.models.tensors import own, shown
from seqlab.parallel.mesh import weight_sharding

#: What files hold besides weights, and every model computes for itself.
BUFFERS = (
    r"(.*\.)?rotary_emb\.inv_freq",
    r"(.*\.)?(attention|attn)\.(masked_)?bias",
)
WIDTHS = ("float32", "bfloat16", "float16")
LISTED = 20  # names in one message


class Drifted(ModelError):
    """Weights that are one tensor in a family's files have come to differ."""


def imported(
    path: pathlib.Path,
    skeleton: lm.LM,
    rules: Iterable[Rule],
    tensors: Mapping[str, np.ndarray],
    ignored: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Every weight of the skeleton, from the tensors of `path`, on the devices of the ambient mesh.

    Matrices keep their dtype; norms, biases and the like become float32, which changes no value.
    Raises ModelError where a tensor is missing, left over, or of another shape or dtype.
    """
    like, named, narrow = parameters(skeleton), axes(skeleton), decays(skeleton)
    rules = _applicable(rules, like)
    _compare_names(path, rules, tensors, ignored)
    parts: dict[str, dict] = {name: {} for name in like}
    for rule in rules:
        for name, array in zip(rule.ours, _read(path, rule, tensors, like), strict=True):
            parts[name][rule.repeat] = array
    return {
        name: _placed(parts[name], like[name].shape, named[name], narrow[name])
        for name in largest_first(like)
    }


def exported(rules: Iterable[Rule], weights: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Their tensors, by name, of all our weights; raises Drifted where several of ours are one of
    theirs and are not the same."""
    theirs: dict[str, np.ndarray] = {}
    for rule in _applicable(rules, weights):
        arrays = [np.asarray(weights[name]) for name in rule.ours]
        arrays = arrays if rule.repeat is None else [a[rule.repeat] for a in arrays]
        for name, array in zip(rule.theirs, rule.write(arrays), strict=True):
            if name in theirs and not np.array_equal(theirs[name], array):
                raise Drifted(
                    f"Layers that share {name} in this family differ in it by now: such a model "
                    "cannot be exported, so save it with seqlab.save."
                )
            theirs[name] = array
    return theirs


def _applicable(rules: Iterable[Rule], weights: Mapping[str, Any]) -> list[Rule]:
    """The rules of weights that this model has: lists of rules have biases and the like too."""
    applicable = [rule for rule in rules if any(name in weights for name in rule.ours)]
    times = collections.Counter(name for rule in applicable for name in rule.ours)
    depth = {
        name: weights[name].shape[0]
        for rule in applicable
        if rule.repeat is not None
        for name in rule.ours
        if name in weights
    }
    wrong = sorted(n for n in {*times, *weights} if times[n] != depth.get(n, 1) or n not in weights)
    if wrong:
        raise ModelError(f"The rules of this family do not name each of {wrong} once: mend them.")
    return applicable


def _compare_names(path, rules, tensors, ignored) -> None:
    known = [name for rule in rules for name in rule.theirs]
    passed = re.compile("|".join(f"({pattern})" for pattern in (*BUFFERS, *ignored)))
    missing = [name for name in known if name not in tensors]
    unused = [name for name in tensors.keys() - set(known) if not passed.fullmatch(name)]
    more = lambda names: ", ..." if len(names) > LISTED else ""
    if missing or unused:
        say = lambda names: ", ".join(map(shown, sorted(names)[:LISTED])) + more(names)
        parts = [f"lacks {len(missing)} tensors ({say(missing)})"] * bool(missing)
        parts += [f"has {len(unused)} that have no place ({say(unused)})"] * bool(unused)
        raise ModelError(
            f"{path} {' and '.join(parts)}: it is not the model that its config.json describes."
        )


def _read(path, rule: Rule, tensors, like) -> list:
    """Our arrays of one rule, checked."""
    given = [tensors[name] for name in rule.theirs]
    ours = like[rule.ours[0]].dtype
    known = WIDTHS if jnp.issubdtype(ours, jnp.floating) else (ours.name,)
    for name, array in zip(rule.theirs, given, strict=True):
        if array.dtype.name not in known:
            raise ModelError(
                f"{path}: {name} is {array.dtype}, and weights are {', '.join(known)}: "
                "take the float weights, with the config.json beside them."
            )
    wanted = [like[name].shape[rule.repeat is not None :] for name in rule.ours]
    try:
        arrays = rule.read(given)
        if [array.shape for array in arrays] == wanted:
            return arrays
    except (ValueError, IndexError):
        pass
    raise ModelError(
        f"{path}: {rule.theirs[0]} of shape {list(given[0].shape)} does not become {rule.ours[0]} "
        f"of shape {list(wanted[0])}, which config.json asks for: they are of two models."
    )


def _placed(parts: Mapping[int | None, Any], shape, axes, narrow: bool) -> jax.Array:
    """One weight on its devices, of which each reads its own slice; `parts` by repeat."""
    dtypes = {part.dtype for part in parts.values()}
    dtype = dtypes.pop() if narrow and len(dtypes) == 1 else jnp.float32

    def read(index):  # an array of its own each time: files may change under mapped ones
        if None in parts:
            return own([parts[None][index]], dtype)[0, ...]
        return own([parts[r][index[1:]] for r in range(shape[0])[index[0]]], dtype)

    mesh = jax.sharding.get_mesh()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding = one if mesh.empty else weight_sharding(shape, axes, mesh)
    return jax.make_array_from_callback(shape, sharding, read)
