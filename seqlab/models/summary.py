"""What a model is made of: parameters and the bytes it remembers, block by block."""

import jax
from flax import nnx

from seqlab.layers.registry import mixer_name
from seqlab.models.lm import LM, Config


def parameter_count(model: nnx.Module | None) -> int:
    """Weights of a model or a part of one, which may be abstract, or absent."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def state_bytes(model: LM) -> int:
    """Bytes of state for one sequence, whatever its length; the model may be abstract."""
    return _bytes(jax.eval_shape(lambda model: model.init_state(1), model))


def table(model: LM) -> list[dict]:
    """Rows of `block`, `mixer`, `parameters` (all repeats) and `state_bytes` (per sequence)."""
    c: Config = model.config
    states = jax.eval_shape(lambda: model.init_state(1))
    entries = (*c.before, *c.pattern, *c.after)
    built = (*model.before, *model.blocks, *model.after)
    embedding = parameter_count(model.embed) + parameter_count(model.embed_norm)
    rows = [{"block": "embedding", "parameters": embedding}]
    for i, (entry, block, state) in enumerate(zip(entries, built, states, strict=True)):
        repeated = len(c.before) <= i < len(c.before) + len(c.pattern)
        rows.append(
            {
                "block": f"{i} x {c.repeats if repeated else 1}",
                "mixer": _layers(c.block(entry)),
                "parameters": parameter_count(block),
                "state_bytes": _bytes(state),
            }
        )
    rest = parameter_count(model.norm) + parameter_count(model.head)
    rows.append({"block": "norm" if model.head is None else "norm, head", "parameters": rest})
    return [{"mixer": "", "state_bytes": 0} | row for row in rows]


def _layers(block) -> str:
    """The mixers of a block by name, and its channel mixer."""
    names = [mixer_name(mixer) for mixer in (block.mixer, block.beside) if mixer is not None]
    return " + ".join([*names, *([] if block.ffn is None else ["ffn"])])


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
