"""Trained models with their projections in few bits, for inference alone."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from seqlab.errors import ModelError
from seqlab.layers import int8_linear, ptqtp_linear, ternary_linear
from seqlab.layers.linear_kinds import Dense, kind
from seqlab.models import lm
from seqlab.models.calibrate import largest_inputs
from seqlab.models.parameters import bind, parameters

#: What a model that was trained with a kind of linear map can be packed as.
INSTEAD = {"bit": "ternary", "dense": "ptqtp or int8"}


def ternary(model: lm.LM) -> lm.LM:
    """A model trained with linear="bit", at two bits a weight; its logits are the same numbers.

    This and the others raise ModelError where the model was not trained as they need it.
    """
    _check(model, ternary_linear.Config)
    return _packed(model, ternary_linear.Config(**vars(model.config.linear)))


def ptqtp(model: lm.LM, config: ptqtp_linear.Config) -> lm.LM:
    """A dense model with planes of trits for weights, fitted to the weights alone."""
    _check(model, ptqtp_linear.Config)
    return _packed(model, config)


def int8(model: lm.LM, config: int8_linear.Config, batches: Iterable[np.ndarray]) -> lm.LM:
    """A dense model with weights and activations in eight bits, save the inputs that are outliers
    while it reads `batches` of tokens [B, T]; how many these are replaces config.outliers."""
    _check(model, int8_linear.Config)
    weights = _replaced(parameters(model), parameters(_with(model, config).skeleton()))
    seen = largest_inputs(model, weights, batches)
    most: dict[str, int] = {}
    for path, largest in seen.items():
        name = path.rpartition(".")[2]
        most[name] = max(most.get(name, 0), int(np.max(np.sum(largest >= config.threshold, -1))))
    config = dataclasses.replace(config, outliers=tuple(sorted(most.items())))
    return _packed(model, config, seen)


def projection_bytes(model: lm.LM) -> tuple[int, int]:
    """What the weights of a packed model's projections take in memory, and what they would in
    bfloat16. Norms and biases beside them are as large as ever, and do not count."""
    ours, theirs = parameters(model), parameters(_with(model, Dense()).skeleton())
    paths = _replaced(theirs, ours)
    packed = [name for name in ours.keys() - theirs.keys() if name.rpartition(".")[0] in paths]
    weights = (theirs[f"{path}.weight"] for path in paths)
    return sum(ours[name].nbytes for name in packed), sum(2 * weight.size for weight in weights)


def _check(model: lm.LM, config_class: type) -> None:
    ours, wanted = kind(model.config.linear), config_class.trained_as
    if ours == wanted:
        return
    if ours not in INSTEAD:
        raise ModelError(f"The model is packed already, as {ours}: give the one it was made of.")
    raise ModelError(
        f"A model with linear={ours!r} cannot be packed as {kind(config_class())}: pack it as "
        f"{INSTEAD[ours]}, or train it with linear={wanted!r}."
    )


def _with(model: lm.LM, linear: Any) -> lm.Config:
    return dataclasses.replace(model.config, linear=linear)


def _replaced(params: Mapping[str, Any], packed: Mapping[str, Any]) -> list[str]:
    """The projections that a packed model has in another form, by name."""
    return sorted(name.removesuffix(".weight") for name in params.keys() - packed.keys())


def _packed(model: lm.LM, config: Any, seen: Mapping[str, np.ndarray] = {}) -> lm.LM:
    skeleton, params = _with(model, config).skeleton(), parameters(model)
    for path in _replaced(params, parameters(skeleton)):
        about = (seen[path],) if path in seen else ()
        arrays = config.quantized(params.pop(f"{path}.weight"), path, *about)
        params |= {f"{path}.{key}": array for key, array in arrays.items()}
    return bind(skeleton, params)
