"""Trits in files: what is packed in a model, four to a byte, may be stored five to a byte.

All arrays of uint8 in a model are packed trits (see `kernels.ternary_matmul.packing`).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.errors import CheckpointError
from seqlab.kernels.ternary_matmul.packing import (
    PER_BYTE,
    is_packed,
    pack,
    squeeze,
    unpack,
    unsqueeze,
)

FIVES = ".fives"  # what is stored five to a byte is called, beside its name in the model


def squeezed(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters as they are stored with five trits to a byte."""
    stored = {}
    for name, array in params.items():
        if array.dtype == jnp.uint8:
            trits = unpack(array, PER_BYTE * array.shape[-2])
            stored[name + FIVES] = jnp.asarray(squeeze(np.asarray(trits)))
        else:
            stored[name] = array
    return stored


def restored(
    stored: Mapping[str, Any], like: Mapping[str, jax.Array], where: pathlib.Path
) -> dict[str, Any]:
    """Parameters of the shapes of `like`, from a file's arrays in either form.

    Raises CheckpointError where what should be trits is something else.
    """
    params = {}
    for file_name, array in stored.items():
        name = file_name.removesuffix(FIVES)
        if name != file_name and name in like:
            trits = unsqueeze(np.asarray(array), PER_BYTE * like[name].shape[-2])
            array = None if trits is None else pack(jnp.asarray(trits))
        elif array.dtype == jnp.uint8 and not is_packed(array):
            array = None
        if array is None:
            raise CheckpointError(f"{where}: {name} is not made of trits: restore the file.")
        params[name] = array
    return params
