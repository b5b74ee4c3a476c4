"""What training carries from step to step, on any mesh, and as named arrays for checkpoints."""

from bisect import bisect_left
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab.errors import DataError
from seqlab.models import lm
from seqlab.models.lm import LM
from seqlab.models.parameters import axes, parameters
from seqlab.parallel.mesh import DATA, SEQ, current_travel, weight_sharding
from seqlab.parallel.packing import hops_needed
from seqlab.train.corpus import Batch


class State(NamedTuple):
    params: dict[str, jax.Array]
    optimizer: Any


def abstract(
    model: LM,
    optimizer: optax.GradientTransformation,
    mesh,
    trained: Collection[str] | None = None,
) -> State:
    """Shapes, dtypes and places of the state. An optimizer's moments lie where their weights do.

    `trained` names the weights that it is made of, by default all; they are at least float32.
    """
    params: dict[str, Any] = parameters(model)
    place = places(model, mesh)
    if trained is not None:
        wide = lambda a: jax.ShapeDtypeStruct(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        params = {name: wide(a) for name, a in params.items() if name in trained}
    everywhere = NamedSharding(mesh, P())

    def placed(path, leaf):
        name = str(getattr(path[-1], "key", ""))
        sharding = place.get(name, everywhere) if leaf.ndim else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = State(params, jax.eval_shape(optimizer.init, params))
    return jax.tree_util.tree_map_with_path(placed, state)


def places(model: LM, mesh) -> dict[str, NamedSharding]:
    """Where each weight of a model lies on a mesh."""
    names = axes(model)
    return {n: weight_sharding(a.shape, names[n], mesh) for n, a in parameters(model).items()}


def start(config: lm.Config, seed: int, optimizer, like: State) -> State:
    """The state before the first step, each weight made on the devices that hold it."""

    def make():
        params = parameters(config.build(rngs=nnx.Rngs(seed)))
        return State(params, optimizer.init(params))

    return jax.jit(make, out_shardings=jax.tree.map(lambda a: a.sharding, like))()


def start_from(arrays: Mapping[str, jax.Array], optimizer, like: State) -> State:
    """The state before the first step where weights begin as these arrays, which it copies."""
    params = {  # copied last: what `device_put` spreads over devices may still be the first's own
        name: jax.device_put(arrays[name].astype(a.dtype), a.sharding).copy()
        for name, a in like.params.items()
    }
    shardings = jax.tree.map(lambda a: a.sharding, like.optimizer)
    return State(params, jax.jit(optimizer.init, out_shardings=shardings)(params))


def to_arrays(state: State) -> dict[str, jax.Array]:
    """`{"params/blocks.0...": array, "optimizer/...": array}`"""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def from_arrays(arrays: Mapping[str, jax.Array], like: State) -> State:
    """The state that `to_arrays` named."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(treedef, [arrays[_name(path)] for path, _ in paths])


def place(batch: Batch, mesh) -> Batch:
    """This process's rows (see `rows_here`) as the global batch, split over the axis `data`.

    Raises DataError where a document begins further back than the strategy "window" looks: a
    compiled step cannot see that, and would forget the document's beginning.
    """
    _require_hops(batch.segment_ids[:, :-1], mesh.shape[SEQ])
    sharding, split = NamedSharding(mesh, P(DATA, None)), mesh.shape[DATA]
    size = len(batch.tokens) * split // len(rows_here(split, mesh))
    rows = rows_here(size, mesh)

    def put(here: np.ndarray) -> jax.Array:
        def piece(index):
            start, stop, _ = index[0].indices(size)
            at = bisect_left(rows, start)
            return here[at : at + stop - start]

        return jax.make_array_from_callback((size, here.shape[1]), sharding, piece)

    return jax.tree.map(put, Batch(*batch))


def _require_hops(segment_ids: np.ndarray, devices: int) -> None:
    travel = current_travel()
    if devices == 1 or travel.strategy != "window":
        return
    needed = hops_needed(segment_ids, devices)
    if needed > (travel.hops or 0):
        raise DataError(
            f"A document begins {needed} devices before its end but mesh.hops = {travel.hops}: go "
            f"on with mesh.hops={needed}, or with another mesh.strategy."
        )


def rows_here(batch: int, mesh) -> list[int]:
    """Which rows of a batch this process's devices hold: its share along `data`.

    Devices that only share the time or the heads of a row hold all of it: as token ids a row is
    small (4 MB a million), and where it is cut is for the compiled step to say.
    """
    place = NamedSharding(mesh, P(DATA)).addressable_devices_indices_map((batch,))
    blocks = {index[0].indices(batch) for index in place.values() if index}
    return [row for block in sorted(blocks) for row in range(*block)]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
