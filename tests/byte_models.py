"""Two byte models that are cheap to ask: one that any length suits, one that holds little."""

from flax import nnx

from seqlab.layers.mixers import attention, gla
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters


def heeding() -> lm.LM:
    """Weights large enough that what it says depends on what it has read."""
    config = lm.Config(
        vocab=257, d_model=16, pattern=(gla.Config(heads=2, chunk_size=8),), ffn=None
    )
    built = config.build(rngs=nnx.Rngs(0))
    return bind(built, {n: a * 4 if a.ndim > 2 else a for n, a in parameters(built).items()})


def forgetful() -> lm.LM:
    """One that holds 32 tokens."""
    config = lm.Config(vocab=257, d_model=16, pattern=(attention.Config(max_length=32),), ffn=None)
    return config.build(rngs=nnx.Rngs(0))
