"""Meshes, and where the named axes of a weight go on them."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab.errors import ConfigError, nearest
from seqlab.parallel.torus import laid, located

DATA, SEQ, MODEL = "data", "seq", "model"  # the mesh axes: they split batch, time, heads

#: Logical axis of a weight -> mesh axis. Weights are split over `data` too (as in FSDP): XLA
#: gathers each layer's when it is used and scatters its gradient.
RULES = {"embed": DATA, "heads": MODEL, "ffn": MODEL, "vocab": MODEL, None: None}

#: How states travel along `seq`; `parallel.strategies` has the code and what each costs. "auto" is
#: what the cost model (`parallel.cost`) thinks fastest for the state's size and these devices.
STRATEGIES = ("all_gather", "ring", "all_scan", "doubling", "window", "two_level", "auto")

#: How softmax attention sees the keys of other devices along `seq`.
ATTENTIONS = ("gather_kv", "ring", "zigzag", "token_ring", "ulysses", "rsa")


class Travel(NamedTuple):
    """How what mixers remember travels along `seq`.

    strategy   of recurrent states, one of STRATEGIES
    attention  of keys and values, one of ATTENTIONS
    hops       of the strategy "window": how many devices back a document may have begun
    blocks     in how many blocks a pipelined strategy cuts the state; None is what suits
    row        how many devices make a row of the strategy "two_level"; None is what suits

    Whatever is not None must be possible on the mesh, also where the strategy has no use for it.
    """

    strategy: str = "all_gather"
    attention: str = "gather_kv"
    hops: int | None = None
    blocks: int | None = None
    row: int | None = None

    def check(self, devices: int) -> "Travel":
        """Itself, if it can be on so many devices along `seq`; else raises ConfigError."""
        for value, known in ((self.strategy, STRATEGIES), (self.attention, ATTENTIONS)):
            if value not in known:
                raise ConfigError(f"There is no strategy {value!r}: {nearest(value, known)}")
        if self.strategy == "window" and self.hops is None:
            raise ConfigError(
                "The strategy 'window' needs hops: one less than the most devices that a document "
                "may touch."
            )
        if self.blocks is not None and self.blocks < 1:
            raise ConfigError(f"A state cannot be cut in blocks={self.blocks}: take 1 or more.")
        if devices > 1 and self.hops is not None and not 0 < self.hops < devices:
            raise ConfigError(
                f"hops={self.hops} must lie between 1 and {devices - 1} on {devices} devices "
                "along seq."
            )
        if devices > 1 and self.row is not None and (self.row < 1 or devices % self.row):
            raise ConfigError(
                f"Rows of row={self.row} devices do not make up the {devices} devices along seq: "
                "take a divisor."
            )
        return self


_NOTHING_CHOSEN = Travel()
_travel = contextvars.ContextVar("travel", default=_NOTHING_CHOSEN)


def make_mesh(data: int = 1, seq: int = 1, model: int = 1, devices: Any = None) -> Mesh:
    """A mesh over the first data * seq * model devices, of those given or else of all.

    Where devices say where they are (TPUs do), consecutive ones along seq are one link apart. Axes
    are Auto: XLA places everything that is not written by hand with shard_map. Raises ConfigError
    if there are fewer devices than that.
    """
    if min(data, seq, model) < 1:
        raise ConfigError(f"The mesh data={data} x seq={seq} x model={model} has an axis below 1.")
    need, devices = data * seq * model, list(devices or jax.devices())
    if need > len(devices):
        raise ConfigError(
            f"The mesh data={data} x seq={seq} x model={model} needs {need} devices but this "
            f"machine has {len(devices)}: make the mesh smaller, or, to try it on a CPU, set "
            f"JAX_NUM_CPU_DEVICES={need}."
        )
    names, axes = (DATA, SEQ, MODEL), (AxisType.Auto,) * 3
    if seq > 1 and all(map(located, devices)):
        return Mesh(laid(devices, data, seq, model), names, axis_types=axes)
    return jax.make_mesh((data, seq, model), names, axes, devices=devices[:need])


@contextlib.contextmanager
def use_mesh(data: int = 1, seq: int = 1, model: int = 1, **travel: Any) -> Iterator[Mesh]:
    """What is called inside runs sharded: batch over `data`, time over `seq`, heads over `model`.

    `travel` are fields of `Travel`, above all `strategy`. They are read while tracing, so a
    function compiled under one strategy keeps it.
    """
    chosen = Travel(**travel).check(seq)
    mesh = make_mesh(data, seq, model)
    token = _travel.set(chosen)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _travel.reset(token)


def current_travel() -> Travel:
    """What the innermost `use_mesh` chose."""
    return _travel.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell XLA how an activation lies on the ambient mesh; outside a mesh, and where an axis does
    not divide its dimension, nothing is asked."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    fits = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*fits))


def weight_sharding(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh):
    """Where a weight with these logical axes goes.

    Leading dimensions without a name (layers stacked for the scan) stay whole, and so does a
    dimension that the mesh axis does not divide.
    """
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    spec = [RULES[name] for name in names]
    fits = [
        a if a and size % mesh.shape[a] == 0 else None for a, size in zip(spec, shape, strict=True)
    ]
    return NamedSharding(mesh, P(*fits))


def weight_shardings(
    shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple], mesh: Mesh
) -> dict[str, NamedSharding]:
    """`weight_sharding` for every named weight."""
    return {name: weight_sharding(shape, axes[name], mesh) for name, shape in shapes.items()}


def placed(array: Any, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight with these logical axes where it goes on the ambient mesh; outside one, and while it
    is traced, as it is."""
    if isinstance(array, Tracer):
        return array
    mesh = jax.sharding.get_mesh()
    return array if mesh.empty else jax.device_put(array, weight_sharding(array.shape, axes, mesh))
