"""What a model computes, however its config says it."""

from typing import Any

from seqlab import settings
from seqlab.models import decoder, lm

#: Fields of configs that say how a model runs rather than what it computes.
RUNNING = {"max_length", "implementation", "chunk_size", "dtype", "remat", "published"}
#: Fields of a model's config that its blocks, one by one, say as well.
FOLDED = {"before", "pattern", "repeats", "after", "ffn", "join"}


def essence(config: lm.Config) -> tuple[dict, list[dict]]:
    """What is said of the whole model, and its layers from the first, as plain JSON."""
    rest = {name: value for name, value in settings.plain(config).items() if name not in FOLDED}
    blocks = [settings.plain(block) for _, _, block in decoder.places(config)]
    return _without_running(rest), _without_running(blocks)


def _without_running(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {n: _without_running(value) for n, value in plain.items() if n not in RUNNING}
    return [_without_running(value) for value in plain] if isinstance(plain, list) else plain
