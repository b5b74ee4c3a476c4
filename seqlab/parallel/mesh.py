"""Meshes, and where the named axes of a weight go on them."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab.errors import ConfigError, nearest

DATA, SEQ, MODEL = "data", "seq", "model"  # the mesh axes: they split batch, time, heads

#: Logical axis of a weight -> mesh axis. Weights are split over `data` too (as in FSDP): XLA
#: gathers each layer's when it is used and scatters its gradient.
RULES = {"embed": DATA, "heads": MODEL, "ffn": MODEL, "vocab": MODEL, None: None}

#: How states travel along `seq`; `parallel.sequence` has the code.
STRATEGIES = ("all_gather", "ring")

_strategy = contextvars.ContextVar("strategy", default="all_gather")


def make_mesh(data: int = 1, seq: int = 1, model: int = 1) -> Mesh:
    """A mesh over the first data * seq * model devices.

    Axes are Auto: XLA places everything that is not written by hand with shard_map. Raises
    ConfigError if there are fewer devices than that.
    """
    if min(data, seq, model) < 1:
        raise ConfigError(f"The mesh data={data} x seq={seq} x model={model} has an axis below 1.")
    need, devices = data * seq * model, jax.devices()
    if need > len(devices):
        raise ConfigError(
            f"The mesh data={data} x seq={seq} x model={model} needs {need} devices but this "
            f"machine has {len(devices)}: make the mesh smaller, or, to try it on a CPU, set "
            f"JAX_NUM_CPU_DEVICES={need}."
        )
    axes = (AxisType.Auto,) * 3
    return jax.make_mesh((data, seq, model), (DATA, SEQ, MODEL), axes, devices=devices[:need])


@contextlib.contextmanager
def use_mesh(
    data: int = 1, seq: int = 1, model: int = 1, *, strategy: str = "all_gather"
) -> Iterator[Mesh]:
    """What is called inside runs sharded: batch over `data`, time over `seq`, heads over `model`.

    `strategy` names how states travel along `seq` (see `sequence.enter`). It is read while tracing,
    so a function compiled under one strategy keeps it.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"There is no strategy {strategy!r}: {nearest(strategy, STRATEGIES)}")
    mesh = make_mesh(data, seq, model)
    token = _strategy.set(strategy)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _strategy.reset(token)


def current_strategy() -> str:
    """The sequence-parallel strategy chosen by the innermost `use_mesh`."""
    return _strategy.get()


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
