"""What holds documents of a limited length says so where one is longer."""

import jax
from jax.core import Tracer

from seqlab.errors import ModelError


def refuse_overflow(position: jax.Array, limit: int, holder: str, instead: str = "") -> None:
    """Raises ModelError, which begins with `holder`, if it can be known that positions [B, T] are
    not all below a limit."""
    T, traced = position.shape[1], isinstance(position, Tracer)
    length = T if traced else max(T, int(position.max()) + 1)
    if length > limit:
        raise ModelError(
            f"{holder} with max_length={limit} cannot hold {length} tokens: shorten the document, "
            f"or give the config a larger max_length{instead}."
        )
