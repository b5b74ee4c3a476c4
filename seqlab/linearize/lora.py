"""Low-rank adaptation (Hu et al., 2021): a frozen map and a small one beside it, one again when
training is over.

    y = x W + b + (x A) B alpha / rank,    A [d_in, rank] uniform (He), B [rank, d_out] zero
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.errors import ModelError, nearest
from seqlab.layers import linear_kinds
from seqlab.layers.linear import Linear, product
from seqlab.layers.linear_kinds import kind
from seqlab.models import lm
from seqlab.models.parameters import bind, parameters
from seqlab.parallel.mesh import placed

A, B = "lora_a", "lora_b"


class LoraLinear(nnx.Module):
    """A linear map whose weight and bias, by the same names, have `lora_a` and `lora_b` beside
    them, float32. Weights may be stacked over depth: [repeats, d_in, d_out]."""

    def __init__(self, linear: Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        *stack, d_in, d_out = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.gain = alpha / rank
        into, out = linear.weight.get_metadata()["axes"]
        he = jax.nn.initializers.he_uniform(batch_axis=tuple(range(len(stack))))
        a = he(rngs.params(), (*stack, d_in, rank), jnp.float32)
        self.lora_a = nnx.Param(placed(a, (into, None)), axes=(into, None))
        b = jnp.zeros((*stack, rank, d_out), jnp.float32)
        self.lora_b = nnx.Param(placed(b, (None, out)), axes=(None, out))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.weight[...].astype(x.dtype))
        low = product(x, self.lora_a[...].astype(x.dtype))
        y += product(low, self.lora_b[...].astype(x.dtype)) * self.gain
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def wrap(model: lm.LM, names: Sequence[str], rank: int, alpha: float, *, rngs: nnx.Rngs) -> lm.LM:
    """A model with adapters beside the linear maps of its blocks that are called so.

    A name is the end of a map's path: "q", or "mixer.q", or "blocks.0.mixer.q". All weights stay
    the same buffers. Raises ModelError for a name that no map has, and where weights are packed.
    """
    if kind(model.config.linear) != "dense":
        raise ModelError(
            f"The model has linear={kind(model.config.linear)!r}, and adapters stand beside dense "
            "maps: train all of it instead."
        )
    wrapped: lm.LM = jax.tree.map(lambda a: a, model)
    met: dict[str, list[str]] = {}

    def adapted(linear: Linear, path: str) -> nnx.Module:
        met[path] = [name for name in names if f".{path}".endswith(f".{name}")]
        return LoraLinear(linear, rank, alpha, rngs=rngs) if met[path] else linear

    for at in ("before", "blocks", "after"):
        make = lambda linear, path, at=at: adapted(linear, f"{at}.{path}")
        linear_kinds.replace(getattr(wrapped, at), lambda m: type(m) is Linear, make)
    unmet = set(names).difference(*met.values())
    if unmet:
        known = {path.split(".", 2)[2] for path in met}
        raise ModelError(
            f"No map of the model is called {(one := min(unmet))!r}: {nearest(one, known)}"
        )
    return wrapped


def merge(model: lm.LM) -> lm.LM:
    """The model with its adapters in the weights they stand beside: ordinary again.

    Sums are in float32, and cast to the dtype of the weight once. What has no adapter stays the
    same buffer.
    """
    params = parameters(model)
    for at, part in nnx.iter_modules(model):
        if isinstance(part, LoraLinear):
            path = ".".join(map(str, at))
            a, b = params.pop(f"{path}.{A}"), params.pop(f"{path}.{B}")
            weight = params[f"{path}.weight"]
            merged = _merged(weight, a, b, part.gain)
            params[f"{path}.weight"] = jax.device_put(merged, weight.sharding)
    return bind(model.config.skeleton(), params)


def adapters(model: lm.LM) -> frozenset[str]:
    """The names of all adapters' weights: what trains where a stage trains `lora`."""
    return frozenset(name for name in parameters(model) if name.rpartition(".")[2] in (A, B))


@jax.jit
def _merged(weight, a, b, gain):
    with jax.default_matmul_precision("highest"):
        return (weight.astype(jnp.float32) + (a @ b) * gain).astype(weight.dtype)
