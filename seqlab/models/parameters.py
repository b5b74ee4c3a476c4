"""The weights of a model as a flat dictionary, by names that never move.

Training, decoding and checkpoints work on this dictionary: `jax.jit` dispatches a flat dict of
arrays several times faster than a module, and its keys are the names in every file we write.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from seqlab.errors import ModelError
from seqlab.parallel.mesh import RULES

M = TypeVar("M")


def parameters(model: Any) -> dict[str, jax.Array]:
    """`{"blocks.0.mixer.qkv.weight": array, ...}` in a fixed order.

    The names of weights of a NamedTuple of models begin with its fields: so in all of this file.
    """
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def bind(model: M, params: Mapping[str, jax.Array]) -> M:
    """A model like `model` (which may be abstract) that holds the arrays of `params`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(model)
    names = [_name(path) for path, _ in paths]
    if set(names) != set(params):
        missing, extra = sorted(set(names) - set(params)), sorted(set(params) - set(names))
        raise ModelError(
            "These weights are of another model: "
            f"{len(missing)} are missing {missing[:3]} and {len(extra)} are unknown {extra[:3]}."
        )
    return jax.tree.unflatten(treedef, [params[name] for name in names])


def axes(model: Any) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of every weight, by name; raises ModelError where a weight has none, or one
    that `parallel.mesh.RULES` does not know."""
    variables = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_variable)
    return {_name(path): _axes(path, variable) for path, variable in variables}


def decays(model: Any) -> dict[str, bool]:
    """Which weights weight decay may shrink: matrices, save those declared `decay=False`.

    Norms, biases, A_log, D, dt_bias and their kin mean something at their value, not at zero.
    """
    variables = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_variable)
    return {
        _name(path): len(_axes(path, variable)) > 1 and variable.get_metadata().get("decay", True)
        for path, variable in variables
    }


def largest_first(params: Mapping[str, Any]) -> list[str]:
    """Names in the order in which to make weights: each stands in memory twice while it is placed,
    and at the end, when the rest is there, those are small."""
    return sorted(params, key=lambda name: -math.prod(params[name].shape))


def _axes(path, variable) -> tuple[str | None, ...]:
    named = variable.get_metadata().get("axes") if _is_variable(variable) else None
    if named is None or not set(named) <= set(RULES):
        known = ", ".join(str(name) for name in RULES)
        raise ModelError(
            f"The weight {_name(path)} has the axes {named}: declare it as nnx.Param(array, "
            f"axes=(...)) with one of {known} for each dimension."
        )
    return named


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
