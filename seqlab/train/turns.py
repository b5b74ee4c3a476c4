"""Training by `parallel.turns`: the documents of a batch are laid anew in rows of several lengths,
and the gradients of all turns add up to that of the batch."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab.models.lm import LM
from seqlab.models.parameters import parameters
from seqlab.parallel import compiler, cost, groups, turns
from seqlab.parallel.lines import size_of
from seqlab.parallel.mesh import DATA, MODEL, SEQ, current_travel, use_mesh
from seqlab.train import state as states
from seqlab.train.corpus import Batch
from seqlab.train.step import make_gradient, make_update

Span = tuple[int, int, int]  # a document of a batch: row, start, stop


class TurnTraining:
    """What `states.place` and `make_step` are, where rows of several lengths take turns.

    To be used inside of the `use_mesh` that made the mesh. `say` is told the turns of the first
    batch. One program is compiled for each number of devices that shares a row, all of them in the
    first step: whoever watches the run expects that it takes long, and no other.
    """

    def __init__(self, model: LM, optimizer: optax.GradientTransformation, mesh: Mesh, say):
        self.mesh, self._say, self.costs = mesh, say, costs(model)
        self._weights = lambda mesh: {
            name: a.sharding for name, a in states.abstract(model, optimizer, mesh).params.items()
        }
        self._gradient = jax.jit(make_gradient(model), compiler_options=compiler.options())
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._update = jax.jit(make_update(optimizer), donate_argnums=(0, 1, 2))

    def place(self, batch: Batch) -> tuple[float, list[tuple[Mesh, Batch]]]:
        """The predicted speed-up; and of each turn the mesh and the batch on it.

        The batch is all of it, on every process: each makes the same plan.
        """
        data, seq = self.mesh.shape[DATA], self.mesh.shape[SEQ]
        share = (batch.tokens.shape[1] - 1) // seq
        spans = documents(batch)
        plan = turns.plan([b - a for _, a, b in spans], share, data, seq, self.costs)
        taken = list(plan.turns)
        if self._say is not None:
            self._say(f"Documents take {plan}")
            self._say = None
            taken += [turns.Turn(2**i, ()) for i in range(seq.bit_length())]  # padding adds nothing
        placed = []
        for devices, rows in taken or [turns.Turn(1, ())]:
            mesh = meshed(self.mesh, devices)
            size = mesh.shape[DATA], devices * share + 1
            whole = laid(batch, [[spans[i] for i in row] for row in rows], size)
            here = states.rows_here(size[0], mesh)
            placed.append((mesh, states.place(Batch(*(a[here] for a in whole)), mesh)))
        return plan.speedup, placed

    def step(self, params: dict, state: Any, placed) -> tuple[dict, Any, dict[str, Any]]:
        """As the step of `make_step`; the metrics hold `predicted_speedup` too."""
        speedup, batches = placed
        # a program may know one mesh only: weights move to that of the turn, gradients back
        home = self._weights(self.mesh), NamedSharding(self.mesh, P())
        sums = None
        for mesh, alike in itertools.groupby(batches, key=lambda turn: turn[0]):
            here = jax.device_put(params, self._weights(mesh))
            for _, batch in alike:
                with _on(mesh):
                    more = self._gradient(here, batch)
                more = jax.device_put(more, home)
                sums = more if sums is None else self._add(sums, more)
        params, state, metrics = self._update(params, state, sums)
        return params, state, metrics | {"predicted_speedup": np.float32(speedup)}


def documents(batch: Batch) -> list[Span]:
    """Those of a batch with a token to predict; one that begins in a row's last token has none."""
    found = []
    for row, ids in enumerate(batch.segment_ids):
        borders = np.flatnonzero(np.diff(ids)) + 1
        spans = zip([0, *borders.tolist()], [*borders.tolist(), len(ids)], strict=True)
        found += [(row, a, b) for a, b in spans if ids[a] > 0 and b - a > 1]
    return found


def laid(batch: Batch, rows: list[list[Span]], size: tuple[int, int]) -> Batch:
    """These documents of the batch, in these rows, of a batch of another size."""
    new = Batch(*np.zeros((2, *size), np.int32))
    for row, spans in enumerate(rows):
        end = 0
        for number, (source, start, stop) in enumerate(spans):
            place = row, slice(end, end + stop - start)
            new.tokens[place] = batch.tokens[source, start:stop]
            new.segment_ids[place] = number + 1
            end += stop - start
    return new


def meshed(mesh: Mesh, devices: int) -> Mesh:
    """The same devices in the same order, so many of them along a row."""
    anew = mesh.devices.reshape(-1, devices, mesh.shape[MODEL])
    return Mesh(anew, mesh.axis_names, axis_types=mesh.axis_types)


@contextlib.contextmanager
def _on(mesh: Mesh) -> Iterator[None]:
    """What is called inside runs on this mesh; how states travel stays, as far as rows allow."""
    devices, travel = mesh.shape[SEQ], current_travel()
    if travel.row is not None and devices % travel.row:
        travel = travel._replace(row=None)
    with use_mesh(**travel._asdict()), jax.set_mesh(mesh):
        yield


def costs(model: LM) -> groups.Costs:
    """What the cost model expects of training it on this machine's devices: a layer that holds so
    many tokens of a document attends to all of them, one without a limit passes on a state."""
    weights = sum(a.size for a in parameters(model).values())
    blocks = [*model.before, *model.blocks, *model.after]
    states_of = jax.eval_shape(lambda model: model.init_state(1), model)  # stacked by repeats
    softmax = linear = held = 0
    for block, state in zip(blocks, states_of, strict=True):
        repeats = len(jax.tree.leaves(state)[0])
        limited = [getattr(layer, "max_length", None) is not None for layer in block.layers]
        softmax += repeats * sum(limited)
        if not any(limited):
            linear, held = linear + repeats, held + size_of(state)
    width, link = model.config.d_model, cost.this_link()
    return groups.costs(link, weights, width, softmax, linear, held // max(linear, 1))
